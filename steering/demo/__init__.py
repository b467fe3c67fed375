"""The embedded model: a small chat model made by this project, its corpus, judges, weights and fitted concepts.

`MODEL` is the folder of the weights (model id `setpoint-demo`), `CONCEPTS` that of the fitted concepts. Importing this
package imports neither torch nor transformers. The card is `README.md` beside this file.
"""

from __future__ import annotations

from pathlib import Path

from steering.demo.words import TOPICS

MODEL_ID = "setpoint-demo"
MODEL: Path = Path(__file__).parent / "model"
CONCEPTS: Path = Path(__file__).parent / "concepts"
CONCEPT_NAMES: tuple[str, ...] = (
    "positive", "negative", "polite", "rude", "refusal", "compliance", "english", "spanish", "formal", "informal",
    "truthful", *TOPICS,
)  # fmt: skip

__all__ = ["CONCEPTS", "CONCEPT_NAMES", "MODEL", "MODEL_ID", "TOPICS"]
