"""The torture campaign: kills, full disks, mutated files, wrecked run folders, bombs and hostile models.

`python -m torture` in tests/ runs every part and prints a table of counts (docs/reliability.md); CI runs
it with `--short`.
"""
