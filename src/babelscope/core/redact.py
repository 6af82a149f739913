"""Removes credentials from what is shown, logged or sent to MLflow."""

import os
import re

# The environment variables from which libraries of the pipeline read passwords and tokens.
SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
# Shorter values are not secrets, and are part of many texts.
_SHORTEST = 4
_USER = re.compile(r"(?<=://)[^\s/?#]*@")


def redact(text: str) -> str:
    """`text` with `***` for the values of `SECRETS` in the environment, and without user and password in its URLs.

    `http://me:password@host/v1` becomes `http://host/v1`. A password in a URL ends at its last `@` (RFC 3986, 3.2.1).
    """
    text = _USER.sub("", text)
    for value in {os.environ.get(name, "").strip() for name in SECRETS}:
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return text
