"""Use SRCD with a model and a loop of your own: nothing of cramlab's trainer is needed.

The "model" here is the pattern memoriser, the floor that any model must beat on novel queries.
"""

from itertools import islice

from cramlab import SRCDConfig, score
from cramlab.metrics import Scores
from cramlab.tasks.srcd_oracles import floor

config = SRCDConfig(seq_len=256)
test = config.dataset(seed=0, split="test", batch_size=16)

total = Scores()
for batch in islice(test, 8):
    predictions = floor("memoriser", config, batch, seed=0)  # yours: Predictions(level=..., logits=...)
    total = total + score(predictions, batch)

print(f"recurring {total.retrieval_acc('recurring'):.3f}")
print(f"novel     {total.retrieval_acc('novel'):.3f}")
print(f"dynamics  {total.dynamics_mse:.4f} (at best {config.dynamics_floor:.4f})")
