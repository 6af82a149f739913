"""Everything MLflow: an index of what DVC holds, which can be deleted and rebuilt (`stages/track.py`).

`training`: live runs of the SAE trainings. `sync`: the runs of one pipeline state. `store`: where the runs lie.
Only this package imports mlflow, and only when it is used, for the import takes a second.
"""
