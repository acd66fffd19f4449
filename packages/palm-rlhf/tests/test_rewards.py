"""Rewards of every form, reward models, prompts of every form."""

import math
from dataclasses import replace

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.rewards import ClassifierReward, as_reward, check_scores
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout, rollout_of


def two_sums():
    sums = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+1=", "answer": "2"}]
    rollout = rollout_of(load_prompts(sums, tokenizer=ByteTokenizer()), [torch.tensor([52]), torch.tensor([51, 50])])
    return replace(rollout, texts=["4", "32"])


@pytest.fixture
def example():
    """Two sums, the first with the right answer."""
    return two_sums()


def exact(prompts, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def sometimes(prompts, completions, **columns):
    return [None if "2" in prompt else 1.0 for prompt in prompts]


def text_lengths(prompts, completions):
    return [float(len(text)) for text in completions]


def lengths_by_half(sequences, prompt_lengths):
    assert sequences.shape == (2, 6)
    return prompt_lengths * 1.5


@pytest.mark.parametrize(
    ("reward", "scores"),
    [
        (exact, [1.0, 0.0]),  # of texts, with their columns
        (lengths_by_half, [6.0, 6.0]),  # of padded ids
        (sometimes, [math.nan, 1.0]),
        ([(2.0, exact), (0.5, sometimes)], [2.0, 0.5]),
    ],
)
def test_callables_of_texts_or_of_ids_and_weighted_lists_score_responses(example, reward, scores):
    assert as_reward(reward)(example).tolist() == pytest.approx(scores, nan_ok=True)


def test_module_and_function_name_a_reward():
    assert as_reward("math:dist").function is math.dist


def test_a_reward_model_is_deterministic_scores_rows_alone_and_reads_its_mask(make_palm):
    reward = RewardModel(make_palm(), dropout=0.5)
    torch.nn.init.normal_(reward.prompt_embed)
    for parameter in reward.palm.finetune_parameters("reward"):
        torch.nn.init.normal_(parameter, std=0.3)  # dropout of the scope would show
    reward.train()
    rollout = rollout_of(
        load_prompts([torch.tensor([1, 2]), torch.tensor([3])]), [torch.tensor([4, 5, 6]), torch.tensor([7])]
    )
    whole = as_reward(reward)(rollout)
    assert torch.equal(whole, as_reward(reward)(rollout))
    assert reward.training
    reward.eval()
    for row, (ids, prompt) in enumerate((([1, 2, 4, 5, 6], 2), ([3, 7], 1))):
        alone = reward(torch.tensor([ids]), prompt_lengths=torch.tensor([prompt]))
        torch.testing.assert_close(whole[row], alone[0], rtol=1e-5, atol=1e-6)
    padded = reward(
        torch.tensor([[9, 9, 3, 7]]),
        mask=torch.tensor([[False, False, True, True]]),
        prompt_mask=torch.tensor([[False, False, True, False]]),
    )
    torch.testing.assert_close(padded[0], whole[1], rtol=1e-5, atol=1e-6)


def test_reward_models_average_the_response_only(make_palm):
    reward = RewardModel(make_palm()).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    features = reward.palm.hidden(ids, finetune_scope="reward")
    wanted = reward.head(features[:, 2:].mean(dim=1))[:, 0]
    torch.testing.assert_close(reward(ids, prompt_lengths=torch.tensor([2])), wanted)
    mask = torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(reward(ids, prompt_mask=mask), wanted)


def test_binned_rewards_are_expectations_and_drawn_only_when_asked(make_palm):
    reward = RewardModel(make_palm(), num_binned_output=5).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    chances = reward.logits(ids).softmax(dim=-1)
    torch.testing.assert_close(reward(ids), (chances * torch.arange(5.0)).sum(dim=-1))
    drawn = reward(ids, sample=True, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    loss = reward(ids, labels=torch.tensor([0, 4]))
    torch.testing.assert_close(loss, -(chances[0, 0].log() + chances[1, 4].log()) / 2)


def test_prompt_and_response_embeddings_are_trained(make_palm):
    reward = RewardModel(make_palm())
    reward(torch.tensor([[1, 2, 3]]), prompt_lengths=torch.tensor([1]), labels=torch.tensor([2.0])).backward()
    trained = list(reward.trainable_parameters())
    for parameter in (reward.prompt_embed, reward.response_embed):
        assert any(parameter is other for other in trained)
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in reward.palm.palm_parameters())


def test_a_saved_reward_model_comes_back_with_its_scopes(make_palm, tmp_path):
    palm = make_palm()
    reward = RewardModel(palm).eval()
    ActorCritic(palm)
    torch.nn.init.normal_(reward.head.weight)
    reward.save_pretrained(tmp_path / "reward")
    ids = torch.tensor([[1, 2, 3]])
    again = RewardModel.from_pretrained(tmp_path / "reward").eval()
    torch.testing.assert_close(again(ids), reward(ids))


def test_a_hugging_face_classifier_scores_with_its_own_tokenizer(example):
    transformers = pytest.importorskip("transformers")

    class Words:
        pad_token_id = 0

        def __call__(self, texts, padding, truncation, return_tensors):
            ids = [[ord(c) % 30 + 1 for c in text] for text in texts]
            width = max(map(len, ids))
            tensors = {
                "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            }
            return transformers.BatchEncoding(tensors)

    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    scores = ClassifierReward(model, Words())(example)
    alone = torch.cat([model(**Words()([text], True, True, "pt")).logits[:, 0] for text in ("2+2=4", "1+1=32")])
    torch.testing.assert_close(scores, alone.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), r"must return shape \(2,\)"),
        (torch.zeros(2, 1), r"must return shape \(2,\) or \(2, 6\)"),
        (torch.tensor([0.0, math.nan]), "rewards must be finite, got nan for response 1"),
        ([math.inf, 0.0], "rewards must be finite, got inf for response 0"),
    ],
)
def test_wrong_rewards_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        check_scores(values, two_sums())


def test_prompts_of_every_form_have_the_same_ids(tmp_path):
    rows, lines = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    rows.write_text('{"prompt": "ab", "answer": 1}\n\n{"prompt": "c", "answer": 2}\n')
    lines.write_text("ab\n\nc\n")
    ids = [[97, 98], [99]]
    for form in (
        ["ab", "c"], [torch.tensor(row) for row in ids], ids, [{"prompt": "ab"}, {"text": "c"}], rows, str(rows), lines,
    ):  # fmt: skip
        prompts = load_prompts(form, tokenizer=ByteTokenizer())
        assert [prompt.ids.tolist() for prompt in prompts] == ids
        assert [prompt.text for prompt in prompts] == ["ab", "c"]
    assert load_prompts(rows, tokenizer=ByteTokenizer())[1].columns == {"answer": 2}
    # a tokenizer of the original is a function of texts
    called = load_prompts(["ab", "c"], tokenizer=lambda texts: [list(text.encode()) for text in texts])
    assert [prompt.ids.tolist() for prompt in called] == ids


def test_chats_go_through_the_template():
    chat = [{"role": "user", "content": "hi"}]
    tokenizer = ByteTokenizer()
    (prompt,) = load_prompts([chat], tokenizer=tokenizer)
    assert prompt.ids.tolist() == tokenizer.apply_chat_template(chat)


def test_columns_reach_the_reward_through_a_drawn_rollout(make_palm):
    tokenizer = ByteTokenizer()
    prompts = load_prompts([{"prompt": "ab", "answer": "x"}], tokenizer=tokenizer)
    policy = ActorCritic(make_palm(num_tokens=259), with_critic=False)
    rollout = draw_rollout(policy, prompts, SamplingSettings(max_new_tokens=3), tokenizer=tokenizer)
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, **columns)
        return [0.0]

    as_reward(spy)(rollout)
    assert seen["prompts"] == ["ab"]
    assert seen["answer"] == ["x"]
    assert seen["completion_ids"] == [rollout.ids[0, 2 : int(rollout.lengths[0])].tolist()]


@pytest.fixture
def words():
    """Makes a Hugging Face tokenizer of two words, with or without an end."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")

    def make(**special):
        vocabulary = {"a": 0, "b": 1, "[UNK]": 2, **dict.fromkeys(special.values(), 3)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **special)

    return make


def test_a_hugging_face_tokenizer_is_wrapped_and_its_end_token_known(make_palm, trainer, words):
    ppo = trainer(make_palm(), prompt_token_ids=None, prompts=["a b", "b"], tokenizer=words(eos_token="[EOS]"))
    assert [prompt.ids.tolist() for prompt in ppo.prompts] == [[0, 1], [1]]
    assert ppo.sampling(max_new_tokens=3).eos_id == 3


def test_a_tokenizer_without_padding_or_end_trains_and_only_a_penalty_for_missing_ends_is_refused(
    make_palm, trainer, words
):
    def run(**changes):
        texts = {"prompt_token_ids": None, "prompts": ["a b", "b"], "tokenizer": words()}
        return trainer(make_palm(num_tokens=3), reward=text_lengths, **texts, **changes)

    assert run().sampling(max_new_tokens=3).eos_id is None
    assert run().train(num_episodes=4, max_new_tokens=3).metrics[0]["response_length"] == 3
    with pytest.raises(ValueError, match="missing_eos_penalty needs an end: give eos_id"):
        run(missing_eos_penalty=1.0).train(num_episodes=4, max_new_tokens=3)
