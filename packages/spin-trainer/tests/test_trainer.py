"""The training loop: one generation per iteration, exact resume in both phases, promotion, early stop, files, logs."""

import json
import math
import shutil

import pytest
import torch

from lm_core.checkpoints.checkpoint import list_checkpoints
from lm_core.training.metrics import read_metrics
from spin_trainer import SPIN, SPINTrainer
from spin_trainer.data.opponent_answers import Sampling, answer_prompts
from spin_trainer.data.row_store import RowStore
from spin_trainer.quickstart.small_decoder import SmallDecoder


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.policy_model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_self_play_runs_and_logs_every_update(train, tmp_path):
    trainer, result = train(iterations=2, lambda_=1.0, curves=True)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")

    # the second iteration trains on the answers of both
    assert (result.outcome, result.iterations, result.steps) == ("finished", 2, 4 + 8)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert {"margin", "win_rate", "real_log_prob", "generated_log_prob", "truncation_rate"} <= set(rows[-2])
    assert result.curves.is_file()
    assert trainer.iteration == 2


def test_each_row_is_answered_once_also_by_a_second_run(train, tmp_path, rows_of):
    train()
    first = rows_of(tmp_path / "run", "answers-train")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        shutil.rmtree(checkpoint)
    train()

    assert sorted(row["row"] for row in first) == list(range(12))
    assert rows_of(tmp_path / "run", "answers-train") == first


def test_an_interrupted_generation_is_finished_row_by_row(train, tmp_path, rows_of):
    trainer, _ = train("whole")
    shutil.copytree(tmp_path / "whole" / "generations", tmp_path / "parts" / "generations")
    for file in (tmp_path / "parts").rglob("rows-0.jsonl"):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:2]) + lines[2][:7])  # a batch cut in two, and a line cut in the middle
    resumed, _ = train("parts")

    assert equal(weights_of(resumed), weights_of(trainer))
    for kind in ("answers-train", "scores-train", "answers-valid"):
        key = {row["row"]: row for row in rows_of(tmp_path / "whole", kind)}
        again = rows_of(tmp_path / "parts", kind)
        assert {row["row"]: row for row in again} == key
        assert len(again) == len(key)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"opponent": "policy"}, {"ref_model_ema_decay": 0.9}])
@pytest.mark.parametrize("step", [3, 7])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(train, settings, step, make_model, stop_at):
    common = {"iterations": 2, "epochs": 1, "checkpoint_every": 1, "mix_previous": False, **settings}
    if "ref_model_ema_decay" in settings:
        common["spin_kwargs"] = {"ema_kwargs": {"update_after_step": 0, "update_every": 1}}

    def policy():
        model = make_model(dropout=0.1)
        model.register_buffer("called", torch.zeros(()), persistent=False)
        model.embedding.register_forward_pre_hook(lambda *_: model.called.__setitem__(..., 1.0))
        return model

    whole, _ = train("whole", model=policy(), **common)
    with pytest.raises(SystemExit, match="stopped here"):
        train("parts", model=policy(), trackers=[stop_at(step)], **common)
    resumed, result = train("parts", model=policy(), **common)

    assert result.steps == 8
    assert equal(weights_of(resumed), weights_of(whole))
    whole, resumed = (read_metrics(trainer.checkpoint_folder / "metrics.jsonl") for trainer in (whole, resumed))
    for row in (*whole, *resumed):
        row.pop("pairs_per_second", None)
    assert resumed == whole


def test_precomputed_reference_log_probs_train_as_live_ones_do(train, make_model):
    runs = [train(f"run-{live}", model=make_model().double(), precompute_reference=not live)[0] for live in (0, 1)]

    for one, other in zip(*map(weights_of, runs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_without_a_reference_the_loss_is_that_of_the_policys_own_log_probs(train, tmp_path, rows_of, make_model):
    _, result = train(model=make_model().double(), reference_free=True, lambda_=0.5)
    before = result.history[0]

    assert not rows_of(tmp_path / "run", "scores-train")
    difference = before["real_log_prob"] - before["generated_log_prob"]
    assert before["margin"] == pytest.approx(0.5 * difference, rel=1e-9)
    assert result.history[1]["margin"] > before["margin"]


def test_smaller_micro_batches_change_nothing(train, make_model):
    settings = {"rows": 11, "batch_size": 4, "generation_batch_size": 4}
    one, _ = train("one", model=make_model().double(), **settings)
    for size in (1, 3):
        other, _ = train(f"micro-{size}", model=make_model().double(), micro_batch_size=size, **settings)
        for a, b in zip(weights_of(one), weights_of(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_accumulated_micro_batches_equal_the_whole_batch(train, make_model):
    # the last update has 3 rows, so its micro-batches 2 and 1: a mean of their means would be another loss
    settings = {"rows": 11, "generation_batch_size": 4}
    one, _ = train("one", model=make_model().double(), batch_size=2, gradient_accumulation=2, **settings)
    other, _ = train("other", model=make_model().double(), batch_size=4, **settings)

    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_finished_policy_is_saved_and_opens_again(train, tmp_path):
    # the original asked `checkpoint_every % steps`, and never saved the last model
    trainer, result = train(iterations=2)
    opened = SmallDecoder.from_pretrained(result.iterations_folder / "iteration-2")

    assert equal([p.detach() for p in opened.parameters()], weights_of(trainer))
    assert (result.iterations_folder / "iteration-1").is_dir()


def test_save_needs_no_checkpoint_every_and_replaces_nothing_unasked(train):
    trainer, _ = train()
    folder = trainer.save("mine")

    assert (folder / "model.safetensors").is_file()
    with pytest.raises(FileExistsError, match=r"mine exists; overwrite=True replaces it"):
        trainer.save("mine")
    assert trainer.save("mine", overwrite=True) == folder


def test_validation_comes_every_so_many_updates(train, tmp_path):
    # the original asked `valid_every % steps`: with 2, at updates 1 and 2 only
    train(validate_every=2)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")

    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]


def test_early_stop_puts_the_best_iteration_back(train, tmp_path, make_model):
    # a rate that ruins the model: the start stays the best
    trainer, result = train(
        iterations=3, learning_rate=3.0, end_learning_rate=3.0, early_stop_patience=1, max_grad_norm=None
    )
    start = [parameter.detach() for parameter in make_model().parameters()]

    assert result.outcome == "stopped early"
    assert result.iterations == 1
    assert result.best_iteration == 0
    assert equal(weights_of(trainer), start)


def test_dropout_and_mode_are_put_back(train, make_model):
    model = make_model(dropout=0.3).eval()
    train(model=model, dropout=0.1)

    assert model.blocks[0].out_dropout == 0.3
    assert not model.training


def test_schedules_reach_each_iteration(train, tmp_path):
    train(iterations=3, lambdas=[0.1, 5.0], learning_rates=[1e-3, 2e-3], mix_previous=False)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    first = {row["iteration"]: row["learning_rate"] for row in reversed(rows)}

    assert first == pytest.approx({0: 1e-3, 1: 2e-3, 2: 2e-3})


def test_the_learning_rate_falls_along_a_line_over_the_iteration(train, tmp_path):
    # the original's fell over 1000 steps, however long the run
    train(epochs=2)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]

    assert rates == pytest.approx([1e-2 - 9e-3 * update / 8 for update in range(8)])


def test_a_run_of_so_many_updates_ends_within_an_iteration_whose_rate_falls_to_its_end(train, tmp_path):
    trainer, result = train(iterations=3, max_steps=7, mix_previous=False)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    again, _ = train(iterations=3, max_steps=7, mix_previous=False)

    assert (result.outcome, result.steps, result.iterations) == ("finished", 7, 2)
    assert rates[4:] == pytest.approx([1e-2, 7e-3, 4e-3])
    assert (result.iterations_folder / "iteration-2").is_dir()
    assert equal(weights_of(again), weights_of(trainer))
    assert (trainer.session.max_steps, again.steps) == (7, 7)


@pytest.mark.parametrize(("mix", "updates"), [(True, 4 + 8 + 8), (False, 3 * 4)])
def test_the_length_of_a_run_is_known_beforehand(train, mix, updates):
    trainer, result = train(iterations=3, mix_previous=mix)

    assert trainer.planned_updates == trainer.session.max_steps == result.steps == updates


def test_activations_computed_again_change_nothing(train, llama_model):
    runs = [train(str(again), model=llama_model().double(), gradient_checkpointing=again)[0] for again in (False, True)]

    for a, b in zip(*map(weights_of, runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in runs[1].model.modules())


@pytest.mark.parametrize("form", ["filters", "filter_fn"])
def test_answers_pass_through_the_users_own_filter(train, tmp_path, rows_of, form):
    def only(logits, token=3):
        return logits.masked_fill(torch.arange(12) != token, -torch.inf)

    train(
        **(
            {"filters": [only], "top_p": None}
            if form == "filters"
            else {"filter_fn": only, "filter_kwargs": {"token": 3}}
        )
    )
    assert {token for row in rows_of(tmp_path / "run", "answers-train") for token in row["tokens"]} == {3}


def test_answers_follow_the_sampling_settings(make_model):
    prompts = [(1, 2), (3, 4, 5)] * 8
    greedy = answer_prompts(make_model(), prompts, Sampling(max_seq_len=9, temperature=0.0), 0)
    for settings in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        sampling = Sampling(max_seq_len=9, **{"top_p": None, **settings})
        assert answer_prompts(make_model(), prompts, sampling, 0) == greedy
    short = answer_prompts(make_model(), prompts, Sampling(max_seq_len=9, temperature=0.0, max_new_tokens=2), 0)
    assert [answer.tokens for answer in short] == [answer.tokens[:2] for answer in greedy]
    distinct = Sampling(max_seq_len=9, temperature=0.0, repetition_penalty=1e9)
    answers = answer_prompts(make_model(), prompts, distinct, 0)
    assert all(len({*p, *a.tokens}) == len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True))


def test_answers_stop_at_eos_and_one_that_is_cut_off_gets_none(make_model):
    model = make_model()
    prompts = [(11, 2), (3, 4, 5), (11,)] * 6
    answers = answer_prompts(model, prompts, Sampling(max_seq_len=8, temperature=9.0, top_p=None, eos_id=11), 0)

    assert any(answer.finished for answer in answers)
    assert any(not answer.finished for answer in answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.tokens[-1] == 11) is answer.finished
        assert 11 not in answer.tokens[:-1]
        assert answer.finished or len(prompt) + len(answer.tokens) == 8


@pytest.mark.parametrize(("limit", "eos_id"), [(None, 11), (9, None)])
def test_a_greedy_answer_in_a_batch_is_that_of_the_prompt_alone(make_model, limit, eos_id):
    model, prompts = make_model().double(), [(1, 2), (3, 4, 5, 6), (7,)]
    sampling = Sampling(max_seq_len=9, temperature=0.0, top_p=None, eos_id=eos_id)
    expected = [answer_prompts(model, [prompt], sampling, 0)[0] for prompt in prompts]
    model.max_length = limit  # the padded batch would exceed 9

    assert answer_prompts(model, prompts, sampling, 0) == expected
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answer.finished or len(prompt) + len(answer.tokens) == 9


def test_a_store_cuts_a_torn_line_and_never_writes_a_row_twice(tmp_path):
    store = RowStore(tmp_path, "answers", {"a": 1})
    store.append([{"row": 0, "x": 1}, {"row": 1, "x": 2}])
    file = store.folder / "rows-0.jsonl"
    file.write_bytes(file.read_bytes() + b'{"row": 2, "x')
    again = RowStore(tmp_path, "answers", {"a": 1})
    again.append([{"row": 1, "x": 2}, {"row": 2, "x": 3}])

    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert RowStore(tmp_path, "answers", {"a": 2}).rows == {}


def test_the_loss_of_a_batch_with_live_answers_is_differentiable(make_model, make_rows, tmp_path):
    trainer = SPINTrainer(
        SPIN(make_model(), pad_id=-1, eos_id=11),
        train_sft_dataset=make_rows(4),
        max_seq_len=10,
        eos_id=11,
        device="cpu",
        checkpoint_folder=tmp_path,
    )
    loss = trainer.calc_spin_loss(
        torch.tensor([[1, 2, 10, 1, 2, 11, -1], [4, 3, 2, 10, 2, 3, 4]]), torch.tensor([3, 4])
    )
    loss.backward()

    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.model.policy_model.embedding.weight.grad.abs().sum().item() > 0


@pytest.mark.archives
def test_a_policy_is_read_from_the_originals_checkpoint(make_model, tmp_path):
    from spin_trainer import load_original_checkpoint

    source, target = make_model(1), make_model(2)
    # the layout its save() writes: the policy, and the moving average with its online model and counters
    state = {f"policy_model.{name}": value for name, value in source.state_dict().items()}
    state |= {f"ref_model.ema_model.{name}": value for name, value in make_model(3).state_dict().items()}
    torch.save({"model": {**state, "ref_model.initted": torch.tensor(True)}}, tmp_path / "spin.ckpt.1.pt")
    target.load_state_dict(load_original_checkpoint(tmp_path / "spin.ckpt.1.pt"))

    assert equal(list(source.parameters()), list(target.parameters()))
