"""The text of params.yaml as it is, and with each experiment of experiments/ applied to it."""

from closure import ROOT

from babelscope import config
from babelscope.config import overlay

_BASE = ROOT / "params.yaml"
OVERLAYS = {name: config.read_yaml(path) for name, path in overlay.experiments(ROOT / "experiments").items()}
TEXTS = {"params": _BASE.read_text()} | {
    name: overlay.rewritten(_BASE.read_text(), content, _BASE) for name, content in OVERLAYS.items()
}
CONTENTS = {"params": config.read_yaml(_BASE)} | {
    name: overlay.merge(config.read_yaml(_BASE), content) for name, content in OVERLAYS.items()
}
