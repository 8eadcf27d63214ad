"""Defenses: methods that give a safer fine-tuned model. Each is one short file; `name.py` exports `DEFENSE`."""
