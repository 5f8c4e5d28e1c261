"Write the cards of the packaged models from how they were made and the recorded metric cards (`make readme`)."

from faces2voices.experiments import model_card
from faces2voices.synthesis import WEIGHTS
from faces2voices.synthesis import packaged_models

if __name__ == "__main__":
    for name in packaged_models():
        (WEIGHTS / name / "README.md").write_text(model_card(name), encoding="utf-8")
