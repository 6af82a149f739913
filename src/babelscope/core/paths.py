"""Every path below data/, metrics/ and reports/: docs/contracts.md as code. No other module spells one."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The files and folders of one pipeline, below `root` (the root of the repository, or a test's folder)."""

    root: Path = Path()

    @property
    def data(self) -> Path:
        """All DVC outputs but the metrics."""
        return self.root / "data"

    @property
    def texts(self) -> Path:
        """The sampled texts (stage `sample`)."""
        return self.data / "corpus/texts.parquet"

    @property
    def sources(self) -> Path:
        """Where the texts come from, with versions and licences (stage `sample`)."""
        return self.data / "corpus/sources.json"

    @property
    def hookpoints(self) -> Path:
        """The hookpoints that params.yaml lists (stage `prune`)."""
        return self.data / "hookpoints.json"

    @property
    def activations(self) -> Path:
        """One folder of shards per hookpoint (stage `extract`)."""
        return self.data / "activations"

    @property
    def tokens(self) -> Path:
        """The row order of every activation file (stage `extract`)."""
        return self.activations / "tokens.parquet"

    @property
    def stream(self) -> Path:
        """What stage `stream` leaves for `train` and `encode`."""
        return self.data / "stream"

    @property
    def stream_mode(self) -> Path:
        """What `train.source` said when stage `stream` ran."""
        return self.stream / "mode.json"

    @property
    def saes(self) -> Path:
        """One SAE per hookpoint (stage `train`)."""
        return self.data / "sae"

    @property
    def saes_again(self) -> Path:
        """SAEs of some hookpoints from another seed (stage `retrain`)."""
        return self.data / "sae_again"

    @property
    def all_counts(self) -> Path:
        """The folder of `counts` and `totals` (stage `encode`)."""
        return self.data / "counts"

    def counts(self, hookpoint: str) -> Path:
        """How often every latent of a hookpoint fires on every language."""
        return self.all_counts / f"{hookpoint}.parquet"

    def totals(self, hookpoint: str) -> Path:
        """Tokens and texts per language behind `counts`."""
        return self.all_counts / f"{hookpoint}.totals.parquet"

    @property
    def neurons(self) -> Path:
        """Counts of the model's own neurons (stage `neurons`)."""
        return self.data / "neurons"

    @property
    def features(self) -> Path:
        """The selected features (stage `score`)."""
        return self.data / "scores/features.parquet"

    @property
    def similarity(self) -> Path:
        """How alike the languages' features are (stage `score`)."""
        return self.data / "scores/similarity.parquet"

    @property
    def stability(self) -> Path:
        """Which features come again from another seed (stage `stability`)."""
        return self.data / "stability/features.parquet"

    @property
    def ablation(self) -> Path:
        """The tables `nll`, `by_layer` and `control` (stage `ablate`)."""
        return self.data / "ablation"

    @property
    def loss_recovered(self) -> Path:
        """Loss recovered per SAE and language (stage `quality`)."""
        return self.data / "quality/loss_recovered.parquet"

    @property
    def identification(self) -> Path:
        """The tables `predictions` and `confusion` (stage `identify`)."""
        return self.data / "identify"

    @property
    def generations(self) -> Path:
        """Steered texts (stage `steer`)."""
        return self.data / "steer/generations.parquet"

    @property
    def browse(self) -> Path:
        """The tables behind the feature browser (stage `browse`)."""
        return self.data / "browse"

    @property
    def explanations(self) -> Path:
        """What a language model says of the features (stage `explain`)."""
        return self.data / "explain/explanations.parquet"

    @property
    def reports(self) -> Path:
        """The pages and pictures (stage `report`)."""
        return self.root / "reports"

    def metrics(self, stage: str, hookpoint: str | None = None) -> Path:
        """The figures of a stage, which git tracks."""
        return self.root / "metrics" / f"{stage if hookpoint is None else f'{stage}.{hookpoint}'}.json"
