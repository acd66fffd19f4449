from lm_core.training.metrics import read_metrics
from toy_model import ToyModel
from toy_model.cli import main


def test_the_loss_falls_and_the_model_opens_again(tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 2000)
    run = ["--data", str(tmp_path / "text.txt"), "--checkpoint_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", "--max_steps", "30", "--learning_rate", "0.1", *run]) == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] / 4
    assert ToyModel.from_pretrained(tmp_path / "run" / "checkpoints" / "step-30").output.out_features == 259
