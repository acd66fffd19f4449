"""Every data format gives the same prompts and answers: ids, texts, chats, Hugging Face datasets, files."""

import gzip
import json

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from spin_trainer import as_sft_dataset

BYTES = ByteTokenizer()


@pytest.mark.parametrize(
    "rows",
    [
        [(torch.tensor([1, 2, 3, 11, -1, -1]), 2), ([4, 5, 11], torch.tensor(1))],
        torch.utils.data.TensorDataset(torch.tensor([[1, 2, 3, 11], [4, 5, 11, -1]]), torch.tensor([2, 1])),
    ],
)
def test_ids_are_split_at_the_prompt_and_lose_their_padding(rows):
    dataset = as_sft_dataset(rows, max_seq_len=8, eos_id=11)

    assert [(example.prompt, example.response) for example in dataset] == [((1, 2), (3, 11)), ((4,), (5, 11))]


def test_texts_get_an_eos_and_an_answer_that_is_cut_off_gets_none():
    rows = [{"prompt": "ab", "response": "cd"}, {"prompt": "ab", "response": "cdefgh"}]
    whole, cut = as_sft_dataset(rows, max_seq_len=6, tokenizer=BYTES)

    assert whole.response == (*b"cd", BYTES.eos_id)
    assert cut.response == tuple(b"cdef")
    assert (whole.truncated, cut.truncated) == (False, True)


@pytest.mark.parametrize("answer", ["response", "completion", "answer"])
def test_the_answers_column_has_one_of_three_names(answer):
    (row,) = as_sft_dataset([{"prompt": "a", answer: "b"}], max_seq_len=9, tokenizer=BYTES)

    assert row.response == (98, BYTES.eos_id)


def test_a_chats_prompt_is_what_generation_gets_and_its_answer_ends_with_eos():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (row,) = as_sft_dataset([{"messages": messages}], max_seq_len=99, tokenizer=BYTES)

    assert list(row.prompt) == BYTES.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert [*row.prompt, *row.response] == BYTES.apply_chat_template(messages, add_generation_prompt=False)


def test_a_conversational_prompt_with_a_completion_is_a_chat():
    question = [{"role": "user", "content": "hi"}]
    chat = {"messages": [*question, {"role": "assistant", "content": "yo"}]}
    forms = [chat, {"prompt": question, "completion": "yo"}, {"prompt": question, "completion": chat["messages"][1:]}]
    rows = as_sft_dataset(forms, max_seq_len=99, tokenizer=BYTES)

    assert rows[0] == rows[1] == rows[2]


def test_hugging_face_datasets_and_files_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(lines)
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f"p{n},r{n}\n" for n in range(4)))
    sources = [rows, datasets.Dataset.from_list(rows), tmp_path / "a.jsonl", str(tmp_path / "a.jsonl.gz")]
    sources.append(tmp_path / "a.csv")
    found = [as_sft_dataset(source, max_seq_len=20, tokenizer=BYTES) for source in sources]

    assert len({one.fingerprint for one in found}) == 1
    assert len(found[0]) == 4


def test_prompts_too_long_are_left_out_when_asked_for():
    rows = [{"prompt": "a" * 9, "response": "b"}, {"prompt": "a", "response": "b"}]
    dataset = as_sft_dataset(rows, max_seq_len=9, tokenizer=BYTES, overlong="drop")

    assert (len(dataset), dataset.dropped) == (1, 1)


def test_a_tokenizers_own_template_is_used_and_what_follows_its_eos_is_not_learned(chat_tokenizer):
    tokenizer = HuggingFaceTokenizer(chat_tokenizer)
    messages = [{"role": "user", "content": "sort 3 1"}, {"role": "assistant", "content": "1 3"}]
    (row,) = as_sft_dataset([{"messages": messages}], max_seq_len=99, tokenizer=tokenizer)
    text = chat_tokenizer.apply_chat_template(messages, tokenize=False)

    assert text.endswith("<|end|>\n")
    assert chat_tokenizer.decode([*row.prompt, *row.response]) == text.removesuffix("\n")
    assert row.response[-1] == tokenizer.eos_id
