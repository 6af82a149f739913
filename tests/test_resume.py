"""What an interrupted run has finished is read back, and goes when the work is done."""

import pytest
import torch

from babelscope.core import resume

BATCHES = [[1, 2], [3], [4, 5, 6]]


@pytest.mark.parametrize("damaged", [False, True])
def test_parts_that_were_kept_are_not_computed_again(tmp_path, monkeypatch, damaged):
    done, seen = [], []

    def compute(batch):
        done.append(batch)
        if len(done) == 3 and not seen:
            raise KeyboardInterrupt
        return {"sum": torch.tensor([sum(batch)])}

    with pytest.raises(KeyboardInterrupt):
        list(resume.parts("sum", BATCHES, compute, tmp_path))
    assert done == BATCHES and len(list(tmp_path.iterdir())) == 2
    if damaged:
        (tmp_path / "part-000001.safetensors").write_bytes(b"half")
    monkeypatch.setattr(resume.Progress, "skip", lambda self, count: seen.append(count))
    seen.append(0)
    done.clear()
    found = [int(part["sum"]) for part in resume.parts("sum", BATCHES, compute, tmp_path)]
    assert found == [3, 3, 15] and done == (BATCHES[1:] if damaged else BATCHES[2:])
    assert seen == ([0, 2] if damaged else [0, 2, 1])
    assert [int(part["sum"]) for part in resume.parts("sum", BATCHES, compute, None)] == found


def test_the_folder_is_named_by_what_the_work_depends_on_and_stays_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "input").write_text("x")

    def work(seed, fail=False):
        with resume.kept("toy", {"seed": seed}, [tmp_path / "input"]) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            if fail:
                raise ValueError
        return folder

    with pytest.raises(ValueError):
        work(1, fail=True)
    [left] = (tmp_path / ".scratch").iterdir()
    assert work(2) != left and left.is_dir()
    assert work(1) == left and not left.exists()
    with pytest.raises(ValueError):
        work(1, fail=True)
    (tmp_path / "input").write_text("y")
    assert work(1) != left
