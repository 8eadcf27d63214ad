"""Defenses: what yields a safer fine-tuned model. One short file each: the file `name.py` exports `DEFENSE`."""
