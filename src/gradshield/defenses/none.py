"""`none`: fine-tuning on every row. What other defenses are compared with."""

from gradshield.defenses.base import Defense

DEFENSE = Defense("none", "fine-tune on every row")
