"""The command, end to end: a YAML over a tiny Hugging Face model with its chat template, with LoRA and without."""

import json

import pytest
import torch

from lm_core.tokenizers import load_tokenizer
from lm_core.training.metrics import read_metrics
from spin_trainer.cli import build_parser, main
from spin_trainer.interop import load_model, with_lora

# peft uses an attribute that newer transformers have renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

YAML = """
# a user's file
model: {model}
data: {folder}/train.jsonl
validation_data: {folder}/valid.jsonl
checkpoint_dir: {folder}/run
max_seq_len: 40
iterations: 2
epochs: 1
batch_size: 3
gradient_accumulation: 1
learning_rates: [1.0e-3, 5.0e-4]
learning_rate: 1.0e-3
end_learning_rate: 1.0e-4
lambdas:
  - 0.1
  - 5.0
temperature: 1.0
device: cpu
{lora}
"""


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_a_yaml_trains_a_hugging_face_model_on_chats(hugging_face_folder, tmp_path, capsys, lora):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = tmp_path / "run.yaml"
    config.write_text(
        YAML.format(folder=tmp_path, model=hugging_face_folder, lora="lora_r: 4\nlora_targets: [q_proj, v_proj]" * lora)
    )

    assert main(["train", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "finished after 2 iterations" in printed
    folder = tmp_path / "run" / "iterations" / "iteration-2"
    kind = peft.AutoPeftModelForCausalLM if lora else transformers.AutoModelForCausalLM
    trained = kind.from_pretrained(folder)
    before = transformers.AutoModelForCausalLM.from_pretrained(hugging_face_folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert (trained(ids).logits - before(ids).logits).abs().max().item() > 1e-4
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert (folder / "adapter_config.json").exists() is lora
    (answers,) = (tmp_path / "run").glob("generations/answers-train-1-*/rows-0.jsonl")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == list(range(6))
    rates = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in row]
    assert {row["iteration"]: row["learning_rate"] for row in reversed(rates)} == pytest.approx({0: 1e-3, 1: 5e-4})

    assert main(["train", "--config", str(config)]) == 0  # already complete: nothing is done again
    arguments = [str(folder), "--data", str(tmp_path / "valid.jsonl"), "--max_seq_len=40", "--device=cpu"]
    assert main(["eval", *arguments, "--opponent_model", str(hugging_face_folder)]) == 0
    assert "win rate over" in capsys.readouterr().out


def test_a_resumed_lora_run_ends_bit_for_bit_as_an_uninterrupted_one(hugging_face_folder, tmp_path, train, stop_at):
    pytest.importorskip("peft")
    settings = {"max_seq_len": 40, "eos_id": None, "iterations": 2, "checkpoint_every": 1, "dropout": 0.1}
    data = {f"{name}_sft_dataset": tmp_path / f"{name}.jsonl" for name in ("train", "valid")}

    def run(folder, **changes):
        torch.manual_seed(0)
        model = with_lora(load_model(str(hugging_face_folder)), r=4)
        tokenizer = load_tokenizer(str(hugging_face_folder))
        trainer, _ = train(folder, model=model, tokenizer=tokenizer, **settings, **data, **changes)
        return [parameter.detach().clone() for parameter in trainer.model.trainable_parameters()]

    whole = run("whole")
    with pytest.raises(SystemExit, match="stopped here"):
        run("parts", trackers=[stop_at(3)])

    assert all(torch.equal(a, b) for a, b in zip(run("parts"), whole, strict=True))


def test_generate_writes_each_answer_next_to_the_human_one(hugging_face_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = [str(hugging_face_folder), str(tmp_path / "train.jsonl"), str(output), "--max_seq_len=40"]
    assert main(["generate", *arguments, "--device=cpu"]) == 0
    first = output.read_text()
    assert main(["generate", *arguments, "--device=cpu"]) == 0
    rows = [json.loads(line) for line in first.splitlines()]

    assert output.read_text() == first
    assert len(rows) == 6
    assert rows[0]["real"] == "0 2"
    assert {"prompt", "generated", "finished"} <= set(rows[0])


def test_the_quickstart_ends_with_a_table(tmp_path, capsys, monkeypatch):
    for name, value in {"SUPERVISED_UPDATES": 2, "ROWS": 8, "HELD_OUT": 4, "COMPARED": 6}.items():
        monkeypatch.setattr(f"spin_trainer.quickstart.quickstart.{name}", value)
    assert main(["train", "--checkpoint_dir", str(tmp_path / "quick"), "--batch_size=4", "--device=cpu"]) == 0
    table = (tmp_path / "quick" / "table.md").read_text().splitlines()

    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "supervised start",
        *(f"self-play iteration {number}" for number in range(3)),
        "supervised, continued",
    ]
    assert main(["eval", str(tmp_path / "quick" / "start"), "--device=cpu"]) == 0
    assert "exact match over 6 " in capsys.readouterr().out


def test_a_lora_reference_is_theta_t_in_every_iteration(hugging_face_folder):
    peft = pytest.importorskip("peft")
    from spin_trainer import SPIN

    model = with_lora(load_model(str(hugging_face_folder)), r=4)
    assert isinstance(model, peft.PeftModel)
    spin = SPIN(model, lambda_=1.0)
    ids, prompt_len = torch.tensor([[5, 6, 7, 8]]), torch.tensor([2])
    other = torch.tensor([[5, 6, 9, 9]])
    with torch.no_grad():
        for parameter in spin.trainable_parameters():
            parameter.add_(0.3)
        moved = model(ids).logits.clone()
    with model.disable_adapter(), torch.no_grad():
        off = model(ids).logits.clone()

    torch.testing.assert_close(spin.ref_model(ids), off)  # theta_0
    spin.update_reference_model_with_policy()
    with torch.no_grad():
        for parameter in spin.trainable_parameters():
            parameter.sub_(0.2)
    torch.testing.assert_close(spin.ref_model(ids), moved)  # theta_1, which adapters off would not be
    assert (spin.ref_model(ids) - off).abs().max().item() > 1e-3
    assert abs(spin(other, ids, prompt_len).item() - 0.693147) > 1e-4
    held = sum(tensor.numel() for tensor in spin.ref_model.exported().values())
    assert held < 0.6 * sum(parameter.numel() for parameter in model.parameters())


def test_a_flag_wins_over_the_quickstarts_own_values_also_where_it_is_the_usual_value():
    flags = ["--mix_previous=true", "--batch_size=16"]
    seen = [build_parser().parse(["train", *words]).train for words in ([], flags)]
    assert [(chosen.mix_previous, chosen.batch_size, chosen.lambda_) for chosen in seen] == [
        (False, 64, 1.0),
        (True, 16, 1.0),
    ]


def test_the_printed_configuration_starts_the_quickstart_it_was_printed_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse(["train", "--seed=3", "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    again = build_parser().parse(["train", "--config", str(tmp_path / "run.yaml")]).train
    direct = build_parser().parse(["train", "--seed=3"]).train
    assert {**vars(again), "config": None} == {**vars(direct), "config": None}
    assert direct.lambda_ == 1.0


def test_the_quickstarts_three_sets_share_no_prompt():
    from spin_trainer.quickstart.quickstart import quickstart_data

    prompts = [example.prompt for part in quickstart_data()[1:] for example in part]
    trained = {example.prompt for example in quickstart_data()[0]}

    assert len(prompts) == 2500
    assert not trained & set(prompts)
    assert not set(prompts[:500]) & set(prompts[500:])
