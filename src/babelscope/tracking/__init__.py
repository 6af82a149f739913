"""MLflow as an index of DVC's state, which can be deleted and rebuilt (`stages/track.py`).

Only this package imports mlflow, and only when it is used: the import takes two seconds.
"""
