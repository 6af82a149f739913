"""The command `babelscope export`: SAEs, firings, vectors and features in the formats of other tools, one per module.

`main(target, hookpoints)` of a module writes its files to the folder `target`.
"""
