"""The columns of the tables that the stage `switching` writes."""

import polars as pl

# Changes of the NLL at the switch, see `changes`.
CHANGES = ("cost", "switched", "stayed", "effect", "host", "alone")
PAIR_SCHEMA = {"language": pl.String, "other": pl.String, "groups": pl.Int64}
PAIR_SCHEMA |= dict.fromkeys([*CHANGES, "effect_low", "effect_high"], pl.Float64)
POSITION_SCHEMA = {"hookpoint": pl.String, "layer": pl.Int32, "language": pl.String, "other": pl.String}
POSITION_SCHEMA |= {"position": pl.Int32, "host": pl.Float64, "intruder": pl.Float64}
