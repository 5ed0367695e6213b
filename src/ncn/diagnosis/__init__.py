"""What a model's control signals do over a corpus, with intervals and permutation tests, and a verdict in words.

`diagnose` records the signals once (`record`), measures the record (`variance`, `events`, `homeostasis`,
`stereotyping`), reads the corpus again with signals held still (`freezing`), adds worked examples (`examples`) and sums
up (`verdict`).
"""

from ncn.diagnosis.readers import Reader
from ncn.diagnosis.run import DEFAULT_TOKENS, Diagnosis, diagnose

__all__ = ["DEFAULT_TOKENS", "Diagnosis", "Reader", "diagnose"]
