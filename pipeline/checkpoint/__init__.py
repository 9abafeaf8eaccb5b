"""Checkpoints in DeepSpeed-MoE's native layout, written atomically, verified when read.

A folder of checkpoints holds one folder per tag, ``latest`` and ``best.json``. A tag is complete when its
``manifest.json`` exists: it is written last, with the size and sha256 of every file. A checkpoint holds the
weights that trained. The frozen ones lie in the upcycled checkpoint; a stage-2 checkpoint names the stage-1
checkpoint that holds its experts.
"""
