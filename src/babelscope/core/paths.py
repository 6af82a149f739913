"""Every path below data/, metrics/ and reports/: docs/contracts.md as code. No other module spells one."""

from pathlib import Path


class Paths:
    """The files and folders of one pipeline, below `root` (the root of the repository, or a test's folder).

    The comments name the stage that writes a path.
    """

    def __init__(self, root: Path = Path()) -> None:
        self.root, self.data, self.reports = root, root / "data", root / "reports"
        self.texts = self.data / "corpus/texts.parquet"  # sample
        self.train_texts = self.data / "corpus/train.parquet"  # sample: those of the languages that train SAEs
        self.sources = self.data / "corpus/sources.json"  # sample: where the texts come from, versions and licences
        self.activations = self.data / "activations"  # extract: one folder of shards per hookpoint
        self.tokens = self.activations / "tokens.parquet"  # extract: the row order of every activation file
        self.extended = self.data / "extended"  # extend: the same for languages that train no SAE
        self.extended_tokens = self.extended / "tokens.parquet"
        self.neurons = self.data / "neurons"  # neurons: counts of the model's own neurons
        self.stream = self.data / "stream"  # stream: files that `train` and `encode` copy
        self.stream_mode = self.stream / "mode.json"  # stream: what `train.source` was
        self.saes = self.data / "sae"  # train: one folder per hookpoint
        self.saes_again = self.data / "sae_again"  # retrain: by seed, SAEs of some hookpoints
        self.all_counts = self.data / "counts"  # extend: the folder of `counts` and `totals`
        self.hookpoints = self.data / "hookpoints.json"  # prune: the hookpoints that params.yaml lists
        self.loss_recovered = self.data / "quality/loss_recovered.parquet"  # quality: per SAE and language
        self.features = self.data / "scores/features.parquet"  # score: the selected features
        self.similarity = self.data / "scores/similarity.parquet"  # score: how many features languages share
        self.stability = self.data / "stability/features.parquet"  # stability: which features are found again
        self.features_again = self.data / "stability/again.parquet"  # stability: the features of SAEs from other seeds
        self.sharing = self.data / "sharing/pairs.parquet"  # sharing: latents that texts share with translations
        self.switching = self.data / "switching"  # switching: the tables `pairs` and `positions`
        self.dictionaries = self.data / "dictionaries"  # dictionary: one folder per name, see `dictionary`
        self.baselines = self.data / "baselines"  # baselines: `identification`, `removal`, `repeats`, `transfer`
        self.script = self.data / "script"  # script: the tables `features` and `nll`
        self.identification = self.data / "identify"  # identify: the tables `predictions` and `confusion`
        self.ablation = self.data / "ablation"  # ablate: the tables `nll`, `by_layer` and `control`
        self.steering = self.data / "steer"  # steer: the tables `development` and `generations`
        self.generations = self.steering / "generations.parquet"  # steer: the generated texts
        self.vectors = self.data / "vectors"  # steer: one file per method, and the settings that were chosen
        self.browse = self.data / "browse"  # browse: the tables behind the feature browser
        self.summary = root / "metrics/summary.json"  # report: the headline figures, DVC's only metrics
        self.explanations = self.data / "explain/explanations.parquet"  # explain: explanations of features

    def encoded(self, hookpoint: str) -> tuple[Path, Path]:
        """`counts` and `totals` of the languages that train SAEs (stage `encode`)."""
        folder = self.data / "encoded"
        return folder / f"{hookpoint}.parquet", folder / f"{hookpoint}.totals.parquet"

    def counts(self, hookpoint: str) -> Path:
        """How often every latent of a hookpoint fires on every language (stage `extend`)."""
        return self.all_counts / f"{hookpoint}.parquet"

    def totals(self, hookpoint: str) -> Path:
        """Tokens and texts per language behind `counts` (stage `extend`)."""
        return self.all_counts / f"{hookpoint}.totals.parquet"

    def dictionary(self, name: str) -> Path:
        """The SAEs of one of `baselines.dictionaries`, and its activations if it has its own (stage `dictionary`)."""
        return self.dictionaries / name

    def metrics(self, stage: str, hookpoint: str | None = None) -> Path:
        """The figures of a stage, which git tracks."""
        return self.root / "metrics" / f"{stage if hookpoint is None else f'{stage}.{hookpoint}'}.json"
