"""Self-rewarding: pairs of the best and the worst answer, by ratings or a reward; answers that another engine made."""

import json

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from lm_core.training.metrics import read_metrics
from spin_trainer import SelfRewardingSettings, SelfRewardingTrainer
from spin_trainer.cli import main
from spin_trainer.data.given_answers import prompt_rows, read_answers
from spin_trainer.data.opponent_answers import Answer
from spin_trainer.data.prompt_data import as_prompt_dataset
from spin_trainer.data.rewards import Rater, rewards_of, sums_of_rewards
from spin_trainer.data.sft_data import as_sft_dataset
from spin_trainer.training import self_reward as module

BYTES = ByteTokenizer()
PROMPTS = [{"prompt": letter * 2, "letter": letter} for letter in "abcdefgh"]
SIZES = {"num_tokens": BYTES.vocab_size}


def low_bytes(completions, **_):
    """Share of characters below "@"."""
    return [sum(character < "@" for character in text) / len(text) if text else None for text in completions]


@pytest.fixture
def self_reward(tmp_path, monkeypatch, make_model):
    """``self_reward(folder, **changes)`` runs a small self-rewarding; returns its trainer and result."""
    monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)

    def run(folder="run", **changes):
        arguments = {
            "train_dataset": PROMPTS,
            "tokenizer": BYTES,
            "reward": low_bytes,
            "candidates": 4,
            "max_seq_len": 10,
            "temperature": 1.0,
            "top_p": None,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "end_learning_rate": 1e-2,
            "device": "cpu",
            "checkpoint_dir": tmp_path / folder,
            **changes,
        }
        trainer = SelfRewardingTrainer(make_model(**SIZES), **arguments)
        return trainer, trainer.train()

    return run


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.policy_model.parameters()]


def test_the_score_of_held_out_answers_rises(self_reward, tmp_path):
    _, result = self_reward(valid_dataset=[{"prompt": "x"}] * 40, iterations=4, epochs=2, beta=0.02)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "best_score" in row]

    scores = [entry["score"] for entry in result.history]
    assert result.iterations == 4
    assert scores[-1] > scores[0] + 0.2
    assert result.best_iteration == scores.index(max(scores))
    assert len(rows) == 4
    assert all(row["best_score"] > row["score"] for row in rows)
    assert (result.iterations_folder / "iteration-4").is_dir()


def test_a_pair_is_the_best_and_the_worst_answer_to_a_prompt(self_reward, rows_of, tmp_path):
    trainer, _ = self_reward()
    answers = {row["row"]: row["tokens"] for row in rows_of(tmp_path / "run", "answers-train-candidates")}
    scores = {row["row"]: row["score"] for row in rows_of(tmp_path / "run", "rewards-train")}
    # as if the run were resumed after its first update
    trainer.state.iteration, trainer.state.update, trainer.state.opponent = 0, 1, trainer.state.previous_opponent
    data, _ = trainer._iteration_data()

    expected = []
    for first in range(0, 4 * len(PROMPTS), 4):
        group = sorted((scores[row], row) for row in range(first, first + 4) if scores[row] is not None)
        if group and group[0][0] < group[-1][0]:
            expected.append((first // 4, group[0][0], group[-1][0]))
    assert len(answers) == 32
    assert len({tuple(tokens) for tokens in answers.values()}) > 16  # candidates of a prompt differ
    assert len(data.pairs) == len(expected)
    for (row, low, high), example, worse in zip(expected, data.dataset, data.answers, strict=True):
        assert example.prompt == tuple(BYTES.encode(PROMPTS[row]["prompt"]))
        for tokens, score in ((example.response, high), (worse.tokens, low)):
            text = BYTES.decode(list(tokens))
            assert low_bytes([text]) == [pytest.approx(score)]


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(self_reward, stop_at, monkeypatch, rated, step):
    monkeypatch.setattr(module.SelfRewardingSettings, "score", lambda self, rating: float(len(rating) % 5))
    settings = {"iterations": 2, "checkpoint_every": 1, "rating_max_new_tokens": 8, "rating_draws": 2}
    settings |= {"reward": None} if rated else {}
    whole, first = self_reward("whole", **settings)
    with pytest.raises(SystemExit, match="stopped here"):
        self_reward("parts", trackers=[stop_at(step)], **settings)
    resumed, result = self_reward("parts", **settings)

    assert result.step == first.step > 3
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole), strict=True))


def test_the_mean_of_valid_ratings_counts_and_invalid_ones_are_reported(self_reward, monkeypatch, tmp_path):
    drawn = iter([None, 2.0, 4.0] + [None] * 3 + [1.0, None, None] * 30)
    monkeypatch.setattr(module.SelfRewardingSettings, "score", lambda self, rating: next(drawn))
    self_reward(reward=None, rating_max_new_tokens=4)
    (row,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "invalid_rate" in row]

    assert row["pairs"] == 1  # 3 of the first prompt against 1 of its third answer; all others are equal
    assert row["best_score"] == pytest.approx((3 + 7) / 8)
    assert row["invalid_rate"] == pytest.approx(1 / 32)


@pytest.mark.parametrize(
    ("rating", "score"),
    [
        ("Good.\nScore: 4", 4.0),
        ("score: 1 ... Score: 3.5", 3.5),
        ("**Score:** 5", 5.0),
        ("Score: 6", None),
        ("four", None),
    ],
)
def test_a_rating_is_the_last_score_in_range(rating, score):
    assert Rater().score(rating) == score


def test_the_rater_is_asked_about_question_and_response_as_they_are(chat_tokenizer):
    from lm_core.tokenizers import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(chat_tokenizer)
    ids = Rater().prompt(tokenizer, "what is {response}?", "{prompt} 7")
    text = tokenizer.full_text(ids)

    assert "<question>what is {response}?</question>" in text
    assert "<response>{prompt} 7</response>" in text
    assert text.startswith("<|user|>")
    assert text.endswith("<|assistant|>")


def test_a_reward_in_trls_form_gets_messages_ids_and_columns():
    calls = {}

    def reward(prompts, completions, completion_ids, level):
        calls.update(prompts=prompts, completions=completions, ids=completion_ids, level=level)
        return [1, None]

    question = [{"role": "user", "content": "hi"}]
    rows = [{"messages": question, "level": 3}, {"prompt": "hi"}]
    dataset = as_prompt_dataset(rows, max_seq_len=50, tokenizer=BYTES)
    assert rewards_of(reward, list(dataset), ["a", "b"], [Answer((97,), True), Answer((98,), True)]) == [1.0, None]
    assert calls["prompts"] == [question, "hi"]
    assert calls["completions"] == [[{"role": "assistant", "content": "a"}], "b"]
    assert calls["ids"] == [[97], [98]]
    assert calls["level"] == [3, None]


def test_several_rewards_are_summed_and_none_counts_as_nothing():
    prompts = list(as_prompt_dataset(["a", "b", "c"], max_seq_len=9, tokenizer=BYTES))
    first, second = lambda completions: [1.0, None, None], lambda completions: [2.0, 3.0, None]
    answers = [Answer((97,), True)] * 3

    assert sums_of_rewards([first, second], prompts, ["x", "y", "z"], answers) == [3.0, 3.0, None]


def test_answers_of_another_engine_give_the_run_of_the_own_ones(train, make_rows, rows_of, tmp_path):
    own, result = train("own")
    rows = {row["row"]: row for row in rows_of(tmp_path / "own", "answers-train")}
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"answer_ids": rows[row]["tokens"]}) + "\n" for row in sorted(rows)))
    given, other = train("given", answers=file)

    assert not list((tmp_path / "given" / "generations").glob("answers-train-*"))
    assert other.history == result.history
    assert all(torch.equal(a, b) for a, b in zip(weights_of(given), weights_of(own), strict=True))


def test_candidates_of_another_engine_are_scored_and_paired(self_reward, tmp_path):
    rows = [{"answers": None, "answer": ["aa", "1", "b2", "@"], "finished": [True, True, True, False]}] * 8
    _, result = self_reward(answers=rows)

    assert result.iterations == 1
    assert not list((tmp_path / "run" / "generations").glob("answers-*"))


def test_exported_prompts_and_answers_to_them_belong_together():
    dataset = as_sft_dataset([("ab", "c"), ("de", "f")], max_seq_len=12, tokenizer=BYTES)
    rows = [{**row, "answer": "xy"} for row in prompt_rows(dataset, BYTES)]
    answers = read_answers(rows, dataset, max_seq_len=5, tokenizer=BYTES, eos_ids=[BYTES.eos_id])

    assert [row["prompt"] for row in rows] == ["ab", "de"]
    assert answers == [Answer((*b"xy", BYTES.eos_id), True)] * 2
    cut = [{**row, "finished": False} for row in rows]
    assert (
        read_answers(cut, dataset, max_seq_len=5, tokenizer=BYTES, eos_ids=[BYTES.eos_id])
        == [Answer(tuple(b"xy"), False)] * 2
    )


@pytest.mark.parametrize("rows", [["ab"], [{"prompt": "ab"}], [{"prompt": "ab", "response": "c"}]])
def test_prompts_are_read_with_and_without_answers(rows):
    (prompt,) = as_prompt_dataset(rows, max_seq_len=9, tokenizer=BYTES)
    assert prompt.prompt == tuple(b"ab")


def test_an_answer_at_the_end_of_a_chat_is_left_out():
    question, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    open_, answered = as_prompt_dataset(
        [{"messages": [question]}, {"messages": [question, reply]}], max_seq_len=99, tokenizer=BYTES
    )
    assert open_.prompt == answered.prompt


plain = pytest.mark.plain
ANSWERS = [
    ([{"answer": "x"}], r"one row for each of the 2 prompts, got 1"),
    ([{"answer": "x"}] * 3, r"one row for each of the 2 prompts, got 3"),
    ([{"text": "x"}] * 2, r"column 'answer' or 'answer_ids', got \['text'\]"),
    ([{"answer": "x", "row": 1}] * 2, r"must answer row 0 of the data, but its row is 1"),
    ([{"answer": "x", "prompt_ids": [1]}] * 2, r"must answer row 0 of the data, but its prompt_ids is \[1\]"),
    ([{"answer": ["x", "y"]}] * 2, r"must have 1 answer\(s\) in answer, got 2"),
    ([{"answer_ids": []}] * 2, r"at least one token|answer\(s\)"),
    ([{"answer_ids": [257, 5]}] * 2, r"no end token before the end of an answer"),
    ([{"answer": "x", "finished": "yes"}] * 2, r"true or false in finished, got 'yes'"),
    ([{"answer": 3.5}] * 2, r"a text or token ids as answer, got '3.5'"),
    (["x"] * 2, r"column 'answer' or 'answer_ids', got str"),
]


@plain
@pytest.mark.parametrize(("rows", "message"), ANSWERS)
def test_answers_are_refused_by_row(rows, message):
    dataset = as_sft_dataset([("ab", "c"), ("de", "f")], max_seq_len=12, tokenizer=BYTES)
    with pytest.raises((ValueError, TypeError), match=message):
        read_answers(rows, dataset, max_seq_len=12, tokenizer=BYTES, eos_ids=[BYTES.eos_id])


SETTINGS = [
    ({"candidates": 1}, r"candidates must be at least 2, got 1"),
    ({"temperature": 0.0}, r"temperature must be above 0, since candidates are equal at 0"),
    ({"rating_draws": 0}, r"rating_draws must be at least 1, got 0"),
    ({"rating_max_new_tokens": 0}, r"rating_max_new_tokens must be at least 1, got 0"),
    ({"rating_max_score": 0.0}, r"rating_max_score must be a finite number above 0"),
    ({"rating_template": "{prompt}"}, r"rating_template must contain {response}, got '{prompt}'"),
    ({"iterations": 0}, r"iterations must be at least 1, got 0"),
]


@plain
@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_a_setting_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        SelfRewardingSettings(max_seq_len=8, **changes)


ARGUMENTS = [
    ({"tokenizer": None}, r"tokenizer is required: answers are scored as texts"),
    ({"answers": [], "iterations": 2}, r"so iterations must be 1, got 2"),
    ({"train_dataset": [{"question": "a"}]}, r"must be a text, or have a prompt or messages, got dict"),
    ({"train_dataset": [{"messages": [{"role": "system", "content": "a"}]}]}, r"must end with a question of the user"),
    ({"train_dataset": ["a" * 20]}, r"leave room for an answer below max_seq_len 10"),
]


@plain
@pytest.mark.parametrize(("changes", "message"), ARGUMENTS)
def test_an_argument_is_refused_before_anything_is_written(make_model, tmp_path, changes, message):
    arguments = {"train_dataset": PROMPTS, "tokenizer": BYTES, "max_seq_len": 10, "device": "cpu", **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        SelfRewardingTrainer(make_model(**SIZES), checkpoint_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@plain
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions: [1.0], r"must return one number for each of 32 answers|for each of 8 answers, got 1"),
        (lambda completions: ["a"] * len(completions), r"must return numbers or None"),
        (lambda completions: [float("inf")] * len(completions), r"must return finite numbers, got inf"),
        (lambda completions: [1.0] * len(completions), r"no prompt of iteration 0 has answers of different scores"),
    ],
)
def test_a_wrong_reward_is_named(self_reward, reward, message):
    with pytest.raises((ValueError, TypeError), match=message):
        self_reward(reward=reward)


@plain
def test_a_reward_that_cannot_be_imported_is_named(capsys):
    assert main(["self-reward", "--model", "a", "--data", "b", "--reward", "nowhere:f"]) == 1
    assert "reward must be module:function, got 'nowhere:f'" in capsys.readouterr().err
