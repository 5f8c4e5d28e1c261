"""Write the cards of the packaged models (`make readme`).

From how they were made, and from the recorded metric cards."""

from faces2voices.experiments import model_card
from faces2voices.storage import WEIGHTS_DIR, packaged_models

if __name__ == "__main__":
    for name in packaged_models():
        (WEIGHTS_DIR / name / "README.md").write_text(model_card(name), encoding="utf-8")
