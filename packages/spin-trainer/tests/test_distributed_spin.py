"""Two gloo processes train, validate and save as one process with the same global batch does, with DDP and with FSDP.

Processes are started by torchrun; every worker asserts the world size.
"""

import pytest
import torch
from torch.torch_version import TorchVersion

from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checkpoints.weights import read_weights
from spin_trainer.quickstart.small_decoder import SmallDecoder

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

needs_sharding = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="FSDP on a CPU needs torch 2.7 or newer"
)

WORKER = """
import signal, sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

import conftest
import lm_core.training.session
from lm_core.checkpoints.tensor_files import save_tensors
from spin_trainer import SPINTrainer
from spin_trainer.interop import with_lora

lm_core.training.session.draw_curves = lambda *_: None
folder, processes = Path(sys.argv[1]), int(sys.argv[2])

def decoder():
    return conftest.decoder().double()

def with_adapters():
    ends = {"eos_token_id": 11, "bos_token_id": None, "pad_token_id": None}
    model = conftest.llama(vocab_size=12, tie_word_embeddings=True, initializer_range=0.5, **ends)
    return with_lora(model.double(), r=4)

def run(name, model, **changes):
    trainer = SPINTrainer(
        model, train_sft_dataset=conftest.sorting_rows(11), valid_sft_dataset=conftest.sorting_rows(5, seed=1),
        max_seq_len=10, eos_id=11, checkpoint_folder=folder / name,
        **{
            "iterations": 2, "epochs": 1, "batch_size": 4 // processes, "gradient_accumulation": 1,
            "generation_batch_size": 3, "learning_rate": 1e-2, "end_learning_rate": 1e-3, "lambda_": 1.0,
            "validate_every": 2, "checkpoint_every": 1, "device": "cpu", **changes,
        },
    )
    assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
    return trainer, trainer()

class StopAt:
    def log(self, values, step):
        if step == 6 and "loss" in values:
            signal.raise_signal(signal.SIGINT)

model = decoder()
_, result = run("plain", model)
assert (result.outcome, result.steps) == ("finished", 9), result
outcome = {"weights": dict(model.state_dict()), "nll": [entry["nll"] for entry in result.history]}
# peft uses an attribute that newer transformers have renamed
warnings.filterwarnings("ignore", category=FutureWarning)
adapted = with_adapters()
run("adapters", adapted, gradient_accumulation=2, batch_size=2 // processes)
outcome["adapters"] = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
if processes == 2:
    # adapters made before anything is seeded
    ends = {"eos_token_id": 11, "bos_token_id": None, "pad_token_id": None}
    base = conftest.llama(vocab_size=12, **ends)
    torch.manual_seed(dist.get_rank())
    apart = with_lora(base, r=4)
    run("apart", apart, iterations=1, max_steps=2)
    everywhere = [None, None]
    dist.all_gather_object(everywhere, {n: p.detach() for n, p in apart.named_parameters() if p.requires_grad})
    outcome["apart"] = everywhere
    resumed = decoder()
    run("plain", resumed)  # finished: loads the last checkpoint
    outcome["resumed"] = dict(resumed.state_dict())
if processes == 2 and TorchVersion(torch.__version__) >= "2.7":
    trainer, result = run("sharded", decoder(), fsdp=True)
    parameter = trainer.model.policy_model.blocks[0].proj_in.weight
    assert type(parameter).__name__ == "DTensor" and parameter.to_local().numel() < parameter.numel()
    outcome["sharded_nll"] = [entry["nll"] for entry in result.history]
    assert trainer().steps == 9  # finished: loads the last checkpoint into shards
    run("sharded-adapters", with_adapters(), gradient_accumulation=2, batch_size=2 // processes, fsdp=True)
    # only rank 0 gets the interrupt, and both stop
    result = run("parts", decoder(), fsdp=True, trackers=[StopAt()])[1]
    assert (result.outcome, result.steps) == ("interrupted", 6), result
    result = run("parts", decoder(), fsdp=True)[1]
    assert (result.outcome, result.steps) == ("finished", 9), result
    # a rate that ruins the model, so the start is put back, into shards
    settings = {"learning_rate": 3.0, "end_learning_rate": 3.0, "max_grad_norm": None}
    trainer, result = run("ruined", decoder(), fsdp=True, early_stop_patience=1, **settings)
    assert (result.outcome, result.best_iteration) == ("stopped early", 0), result
    back = trainer.save("back")
    try:
        run("sharded", decoder())
    except Exception as error:
        outcome["refused"] = str(error)
if not dist.is_initialized() or dist.get_rank() == 0:
    save_tensors(folder / "outcome.safetensors", outcome)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, run_python):
    """Folder and outcome of a run, by number of processes."""
    results = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        (folder / "worker.py").write_text(WORKER)
        run_python(folder / "worker.py", folder, processes, processes=processes)
        results[processes] = folder, load_tensors(folder / "outcome.safetensors")
    return results


def greatest_difference(state, reference):
    assert state.keys() == reference.keys()
    return max(float((state[name] - weight).abs().max()) for name, weight in reference.items())


def test_two_processes_train_to_the_weights_of_one(outcomes):
    assert greatest_difference(outcomes[2][1]["weights"], outcomes[1][1]["weights"]) < 1e-10


@pytest.mark.parametrize("kind", ["plain", pytest.param("sharded", marks=needs_sharding)])
def test_two_processes_give_the_answers_of_one_each_row_once(outcomes, rows_of, kind):
    whole, parts = outcomes[1][0] / "plain", outcomes[2][0] / kind
    one, two = (sorted(rows_of(run, "answers-train-0"), key=lambda row: row["row"]) for run in (whole, parts))

    assert [row["row"] for row in one] == list(range(11))
    assert one == two
    assert len(list(parts.glob("generations/answers-train-0-*/rows-*.jsonl"))) == 2


def test_two_processes_validate_as_one(outcomes):
    assert outcomes[2][1]["nll"] == pytest.approx(outcomes[1][1]["nll"], abs=1e-10)


def test_what_two_processes_saved_is_what_they_trained(outcomes):
    folder, outcome = outcomes[2]
    opened = SmallDecoder.from_pretrained(folder / "plain" / "iterations" / "iteration-2")
    assert greatest_difference(opened.state_dict(), outcome["weights"]) == 0
    assert greatest_difference(outcome["resumed"], outcome["weights"]) == 0


@needs_sharding
def test_sharded_training_ends_with_the_weights_of_one_process_and_opens_on_one(outcomes):
    folder, outcome = outcomes[2]
    opened = SmallDecoder.from_pretrained(folder / "sharded" / "iterations" / "iteration-2")
    assert greatest_difference(opened.state_dict(), outcomes[1][1]["weights"]) < 1e-10
    newest = SmallDecoder.from_pretrained(folder / "sharded" / "checkpoints" / "step-9")
    assert greatest_difference(newest.state_dict(), opened.state_dict()) == 0
    assert outcome["sharded_nll"] == pytest.approx(outcomes[1][1]["nll"], abs=1e-10)


def test_adapters_of_two_processes_are_those_of_one(outcomes):
    assert greatest_difference(outcomes[2][1]["adapters"], outcomes[1][1]["adapters"]) < 1e-10


def test_adapters_that_processes_made_apart_are_one_model(outcomes):
    one, other = outcomes[2][1]["apart"]
    assert greatest_difference(one, other) == 0


@needs_sharding
def test_sharded_adapters_are_those_of_one_process(outcomes):
    stored = read_weights(
        outcomes[2][0] / "sharded-adapters" / "iterations" / "iteration-2" / "adapter_model.safetensors"
    )
    found = {name.replace(".weight", ".default.weight"): value for name, value in stored.items()}
    assert greatest_difference(found, outcomes[1][1]["adapters"]) < 1e-10


@needs_sharding
def test_a_sharded_run_stopped_and_resumed_ends_as_the_uninterrupted_bit_for_bit(outcomes):
    parts, whole = (
        read_weights(outcomes[2][0] / name / "iterations" / "iteration-2" / "model.safetensors")
        for name in ("parts", "sharded")
    )
    assert greatest_difference(parts, whole) == 0


@needs_sharding
def test_the_best_iteration_is_put_back_into_shards(outcomes):
    folder = outcomes[2][0] / "ruined"
    best, back = (read_weights(folder / name / "model.safetensors") for name in ("best/iteration-0", "back"))
    assert greatest_difference(best, back) == 0


@needs_sharding
def test_a_sharded_run_does_not_resume_unsharded(outcomes):
    assert "is of another run: fsdp is False, but was True; train into another folder" in outcomes[2][1]["refused"]


@needs_sharding
def test_the_command_trains_a_bfloat16_chat_model_in_shards_and_prints_so_once(
    hugging_face_folder, tmp_path, run_python
):
    transformers = pytest.importorskip("transformers")
    before = transformers.AutoModelForCausalLM.from_pretrained(hugging_face_folder, dtype=torch.bfloat16)
    before.save_pretrained(hugging_face_folder)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {hugging_face_folder}\ndata: {tmp_path}/train.jsonl\nvalidation_data: {tmp_path}/valid.jsonl\n"
        f"checkpoint_dir: {tmp_path}/run\nmax_seq_len: 40\nepochs: 1\nbatch_size: 2\ngradient_accumulation: 1\n"
        "device: cpu\nfsdp: true\nearly_stop_patience: 1\nlearning_rate: 0.001\n"
    )
    command = ["-m", "spin_trainer", "train", "--config", config]
    printed = run_python(*command, processes=2, PYTHONWARNINGS="default")
    assert printed.count("2 process(es)") == printed.count("weights stored in bfloat16, trained in float32") == 1
    folder = tmp_path / "run" / "iterations" / "iteration-1"
    trained = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    masters = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    assert (trained.dtype, masters.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in masters.state_dict().items():
        assert torch.equal(weight.bfloat16(), trained.state_dict()[name]), name
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        moved = (trained(ids).logits - before(ids).logits).abs().max().item()
    assert 0 < moved < 1  # by two small updates, so not by weights in disorder
