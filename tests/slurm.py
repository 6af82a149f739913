"""The variables that SLURM sets for two processes on two nodes, here of one machine."""

import socket


def two_nodes() -> list[dict[str, str]]:
    """What `srun --nodes 2 --ntasks-per-node 1` sets, for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "babelscope", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in ("0", "1")]
