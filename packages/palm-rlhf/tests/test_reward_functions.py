"""Reward functions in TRL's form, ready ones, rewards of tokens, and what they log; TRL's own where it is installed."""

import importlib.metadata
import json
import math
from dataclasses import replace

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.data.rollouts import rollout_of
from palm_rlhf.reward.functions import (
    FormatReward,
    LengthReward,
    RepetitionPenalty,
    SoftOverlong,
    exact_answer,
    math_answer,
    numeric_answer,
    text_of,
)
from palm_rlhf.reward.log import RewardLog, TrainerState
from palm_rlhf.reward.rewards import as_reward
from palm_rlhf.rl.objectives import GRPO, REINFORCE
from palm_rlhf.rl.trainer import RLHFTrainer

CHAT = [{"role": "user", "content": "2+2"}]
RELEASE = "1.12.0"


@pytest.fixture
def rollout():
    """A text and a chat, with answers of two and three tokens and a column."""
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": CHAT, "answer": "5"}]
    prompts = load_prompts(rows, tokenizer=ByteTokenizer())
    made = rollout_of(prompts, [torch.tensor([52, 33]), torch.tensor([53, 33, 33])])
    return replace(made, texts=["4!", "5!!"])


def test_a_function_of_keywords_alone_gets_everything_that_trl_passes(rollout):
    seen = {}

    def reward(**given):
        seen.update(given)
        return [1.0, 0.5]

    log = RewardLog(TrainerState(global_step=7, max_steps=9))
    assert as_reward(reward)(rollout, log).tolist() == [1.0, 0.5]
    names = {"prompts", "completions", "completion_ids", "answer", "trainer_state", "log_metric", "log_extra"}
    assert seen.keys() == names
    assert seen["prompts"] == ["2+2=", CHAT]
    assert seen["completions"] == ["4!", [{"role": "assistant", "content": "5!!"}]]
    assert seen["completion_ids"] == [[52, 33], [53, 33, 33]]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (7, 9)


def test_a_function_gets_only_what_it_names(rollout):
    assert as_reward(lambda completion_ids: [float(len(ids)) for ids in completion_ids])(rollout).tolist() == [2.0, 3.0]
    assert as_reward(lambda answer, **_: [float(text) for text in answer])(rollout).tolist() == [4.0, 5.0]
    assert as_reward(lambda prompts, trainer_state: [trainer_state.epoch, 1.0])(rollout).tolist() == [0.0, 1.0]

    def of_ids(sequences, prompt_lengths, **_):  # no column has these names
        return prompt_lengths * 1.0

    assert as_reward(of_ids)(rollout).tolist() == rollout.prompt_lengths.tolist()


def test_terms_metrics_and_columns_are_logged_and_none_is_left_out_of_its_term(rollout):
    def first(completions, log_metric, log_extra, **_):
        log_metric("shouting", 0.25)
        log_metric("shouting", 0.75)
        log_extra("text", ["a", "b"])
        return [2.0, None]

    def second(completions):
        return [1.0, 3.0]

    log = RewardLog()
    scores = as_reward([(0.5, first), second, second])(rollout, log)
    assert scores.tolist() == [3.0, 6.0]
    assert log.values() == {
        "shouting": 0.5,
        "rewards/first/mean": 2.0,
        "rewards/first/std": 0.0,
        "rewards/second/mean": 2.0,
        "rewards/second/std": 1.0,
        "rewards/second#2/mean": 2.0,
        "rewards/second#2/std": 1.0,
    }
    columns = log.sample_columns()
    assert columns["text"] == ["a", "b"]
    assert columns["rewards/first"][0] == 2.0
    assert math.isnan(columns["rewards/first"][1])


def test_rewards_of_tokens_are_lists_or_rows_and_add_to_rewards_of_responses(rollout):
    def ragged(completion_ids):
        return [[0.5] * len(ids) for ids in completion_ids]

    width = rollout.ids.shape[1]
    scores = as_reward(ragged)(rollout)
    assert scores.shape == (2, width)
    assert rollout.totals(scores).tolist() == [1.0, 1.5]
    whole = as_reward([ragged, lambda completions: [10.0, None]])(rollout)
    last = rollout.lengths - 1
    assert whole[0, last[0]].item() == 10.5
    assert rollout.totals(whole).tolist() == [11.0, 1.5]
    rows = as_reward(lambda ids, prompt_lengths: torch.ones(2, width))(rollout)
    assert rollout.totals(rows).tolist() == [2.0, 3.0]
    assert as_reward(lambda completions: [None, [1.0, 2.0, 3.0]])(rollout)[0].isnan().all()


def texts_of(completions, answer, **_):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def test_a_reward_of_texts_scores_responses_made_elsewhere(make_palm):
    tokenizer = ByteTokenizer()
    learner = RLHFTrainer(
        make_palm(num_tokens=259), [texts_of, (0.5, FormatReward(r"\d+"))], objective=GRPO(group_size=2),
        tokenizer=tokenizer, device="cpu",
    )  # fmt: skip
    prompts = load_prompts([{"prompt": "1+1=", "answer": "2"}] * 2, tokenizer=tokenizer)
    made = rollout_of(prompts, [torch.tensor([50]), torch.tensor([33, 33])])
    assert learner.score(made).tolist() == [1.5, 0.0]
    row = learner.step(made)
    assert row["reward"] == 0.75
    assert row["rewards/texts_of/mean"] == 0.5
    assert row["rewards/FormatReward/std"] == 0.5


def test_a_run_passes_its_progress_and_writes_what_functions_log(make_palm, tmp_path):
    steps = []

    def reward(completions, trainer_state, log_metric, log_extra, **_):
        steps.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        log_metric("letters", len(completions))
        log_extra("upper", [text.upper() for text in completions])
        return [float(len(text)) for text in completions]

    learner = RLHFTrainer(
        make_palm(num_tokens=259), reward, objective=REINFORCE(), prompts=["ab", "c", "d", "e"],
        tokenizer=ByteTokenizer(), device="cpu", checkpoint_dir=tmp_path, minibatch_size=4, kl_div_loss_weight=0.0,
    )  # fmt: skip
    result = learner.train(num_episodes=16, update_timesteps=8, max_batch_size=4, max_new_tokens=2)
    assert steps == [(0, 4, 0.0)] * 2 + [(2, 4, 2.0)] * 2
    assert [row["letters"] for row in result.metrics] == [4.0, 4.0]
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert sample["upper"] == sample["response"].upper()


def test_a_response_that_every_reward_leaves_out_gets_0_and_is_counted(make_palm):
    learner = RLHFTrainer(
        make_palm(num_tokens=259), lambda completions: [None, 1.0] * (len(completions) // 2), prompts=["a"] * 4,
        objective=REINFORCE(), tokenizer=ByteTokenizer(), device="cpu", kl_div_loss_weight=0.0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no reward for 4 of 8 responses, which get 0"):
        row = learner.train(num_episodes=8, update_timesteps=8, max_new_tokens=2).metrics[0]
    assert row["reward"] == 0.5
    assert row["rewards_missing"] == 0.5


def test_format_matches_whole_responses_of_texts_and_messages():
    texts = ["<think>a\nb</think> c", "<think>a", "x <think>a</think>", "<think>a</think><think>b</think>"]
    assert FormatReward()(completions=texts) == [1.0, 0.0, 0.0, 0.0]
    assert FormatReward()(completions=[[{"role": "assistant", "content": text}] for text in texts]) == [1, 0, 0, 0]
    assert FormatReward(r"\d+")(completions=["12", "12 "]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("so it is 1,000", "1e3", 1.0),
        ("x = -0.5", "-1/2", 1.0),
        ("3 then 4.0", 4, 1.0),
        ("4 then 3", "4", 0.0),
        ("#### 12.", "12", 1.0),
        ("no number", "7", 0.0),
        ("7", "seven", None),
        ("0.1", "0.10000000001", 0.0),
        ("1/0", "1", 1.0),
    ],
)
def test_the_last_number_of_a_response_is_compared_exactly(text, answer, reward):
    assert numeric_answer(completions=[text], answer=[answer]) == [reward]


def test_exact_answers_ignore_surrounding_space_alone():
    assert exact_answer(completions=[" Oslo\n", "oslo", "x"], answer=["Oslo", "Oslo", None]) == [1.0, 0.0, None]


def naive_repetition(ids, size, penalty):
    seen, repeated, total = set(), 0, 0
    for start in range(len(ids) - size + 1):
        gram = "-".join(map(str, ids[start : start + size]))
        repeated += gram in seen
        seen.add(gram)
        total += 1
    return penalty * repeated / total if total else 0.0


def test_repetition_length_and_overlong_penalties_follow_their_formulas():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, (n,), generator=generator).tolist() for n in range(1, 13)]
    found = RepetitionPenalty(ngram_size=2, max_penalty=-0.5)(completion_ids=rows)
    assert found == pytest.approx([naive_repetition(ids, 2, -0.5) for ids in rows])
    assert SoftOverlong(max_length=10, buffer=4)(completion_ids=rows) == pytest.approx(
        [0, 0, 0, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    )
    assert SoftOverlong(max_length=10, buffer=0)(completion_ids=rows)[8:] == [0, 0, -1, -1]
    assert LengthReward(4)(completion_ids=rows) == pytest.approx([-0.75, -0.5, -0.25, 0, -0.25, -0.5, -0.75] + [-1] * 5)


def test_math_verify_finds_equal_answers():
    pytest.importorskip("math_verify", reason="the extra math is not installed: pip install math-verify")
    texts = [r"so \boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", r"\boxed{1}"]
    assert math_answer(completions=texts, solution=[r"$\frac{2}{6}$", r"$\frac{1}{3}$", "words"]) == [1.0, 0.0, None]


def test_a_name_with_arguments_makes_a_reward(rollout):
    reward = as_reward("palm_rlhf.reward.functions:SoftOverlong(max_length=3, buffer=2)")
    assert reward(rollout).tolist() == [-0.5, -1.0]
    assert as_reward("palm_rlhf.reward.functions:FormatReward").function == FormatReward()
    assert as_reward("palm_rlhf.reward.functions:numeric_answer")(rollout).tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def trl_rewards():
    try:
        release = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"trl {RELEASE} is not installed: pip install --no-deps trl=={RELEASE}")
    if release != RELEASE:
        pytest.skip(f"trl {RELEASE} is what the rewards are compared with, got {release}")
    import trl.rewards

    return trl.rewards


@pytest.fixture
def chats():
    """Chats whose responses think, do not think, or repeat."""
    texts = ["<think>a</think>b", "<think>c", "<think></think>", "aaaaaaaaaaaa"]
    prompts = load_prompts([{"prompt": CHAT, "solution": "$4$"}] * 4, tokenizer=ByteTokenizer())
    made = rollout_of(prompts, [torch.tensor(list(text.encode())) for text in texts])
    return replace(made, texts=texts)


def test_rewards_of_trl_itself_run_as_they_are_and_agree_with_ours(trl_rewards, chats):
    pairs = [
        (trl_rewards.think_format_reward, FormatReward()),
        (trl_rewards.get_repetition_penalty_reward(2, -0.5), RepetitionPenalty(2, -0.5)),
        (trl_rewards.get_soft_overlong_punishment(16, 6), SoftOverlong(16, 6)),
    ]
    for theirs, ours in pairs:
        scores = as_reward(theirs)(chats)
        assert len(set(scores.tolist())) > 1
        torch.testing.assert_close(as_reward(ours)(chats), scores)


def test_the_accuracy_reward_of_trl_runs_and_logs_its_columns(trl_rewards, chats):
    pytest.importorskip("math_verify", reason="the extra math is not installed: pip install math-verify")
    answered = replace(chats, texts=[r"\boxed{4}", r"\boxed{5}", "4", r"$\frac{8}{2}$"])
    log = RewardLog()
    scores = as_reward(trl_rewards.accuracy_reward)(answered, log)
    assert scores.tolist()[:2] == [1.0, 0.0]
    assert log.columns["solution"] == ["$4$"] * 4
    torch.testing.assert_close(as_reward(math_answer)(answered), scores)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda r: as_reward(lambda completions: [1.0, math.nan])(r),
            ValueError,
            "returned nan for response 1; return None",
        ),
        (lambda r: as_reward(lambda completions: [1.0])(r), ValueError, r"must return shape \(2,\) or"),
        (lambda r: as_reward(lambda completions: ["a", "b"])(r), TypeError, "must return one number for each response"),
        (
            lambda r: as_reward(lambda completions: None)(r),
            TypeError,
            "must return one number for each response, got NoneType",
        ),
        (
            lambda r: as_reward(lambda completions: [[1.0], [1.0]])(r),
            ValueError,
            "must return 2 numbers for the tokens of resp",
        ),
        (
            lambda r: as_reward(lambda completions: [[1.0, 2.0]])(r),
            ValueError,
            "must return one list for each of 2 responses",
        ),
        (
            lambda r: as_reward(lambda completions: [["a", "b"], [1] * 3])(r),
            TypeError,
            "numbers for the tokens of response 0",
        ),
        (lambda r: as_reward(lambda completions, gold: [1.0, 1.0])(r), TypeError, "needs gold, but gets answer"),
        (
            lambda r: as_reward(lambda **_: [1.0, 1.0])(replace(r, texts=None)),
            ValueError,
            "a reward on texts needs a tokenizer",
        ),
        (
            lambda r: as_reward(lambda completions, log_extra: log_extra("x", [1]) or [1.0, 1.0])(r),
            ValueError,
            r"log_extra\('x'\) needs 2 values, one a response, got 1",
        ),
        (lambda r: RewardLog().log_extra("x", "ab"), TypeError, r"log_extra\('x'\) needs a list"),
        (lambda r: RewardLog().log_metric("x", "1"), TypeError, r"log_metric\('x'\) needs a number"),
        (lambda r: FormatReward("("), ValueError, "pattern must be a regular expression"),
        (lambda r: RepetitionPenalty(0), ValueError, "ngram_size must be at least 1"),
        (lambda r: RepetitionPenalty(2, 0.5), ValueError, "max_penalty must be a finite number of at most 0"),
        (lambda r: SoftOverlong(0, 0), ValueError, "max_length must be at least 1"),
        (lambda r: SoftOverlong(4, 5), ValueError, r"buffer must be in \[0, max_length = 4\], got 5"),
        (lambda r: LengthReward(0), ValueError, "target must be at least 1"),
        (lambda r: text_of(3), TypeError, "completions must be texts or lists of messages, got 3"),
        (lambda r: text_of([{"role": "assistant"}]), TypeError, "completions must be texts or lists of messages"),
        (
            lambda r: as_reward("palm_rlhf.reward.functions:SoftOverlong(4"),
            ValueError,
            'reward must be "module:function"',
        ),
        (
            lambda r: as_reward("palm_rlhf.reward.functions:LengthReward(x)"),
            ValueError,
            "must have plain values as arguments",
        ),
        (lambda r: as_reward("palm_rlhf.reward.functions:Missing"), ValueError, "cannot be imported"),
    ],
)
def test_a_reward_function_is_refused_by_name_where_it_does_not_fit(rollout, call, error, message):
    with pytest.raises(error, match=message):
        call(rollout)
