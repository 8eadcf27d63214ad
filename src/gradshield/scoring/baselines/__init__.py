"""Other scores, one short file each: the file `name.py` exports `SCORER`, whose name is `name`."""
