"""A real chat model: prompts, logits and greedy texts are those of transformers.

`python tests/smollm2.py` fetches it. Without it, these tests are skipped.
"""
import pytest
import torch
from smollm2 import FOLDER

import model as llama

QUESTIONS = ["What is the capital of France?", "What is 7 times 8?",
             "Write a sentence about the sea.", "Name three colours."]


@pytest.mark.skipif(not (FOLDER / "model.safetensors").is_file(),
                    reason="SmolLM2 is not here: python tests/smollm2.py fetches it")
def test_a_real_chat_model_answers_as_in_transformers(transformers):
    """Four questions in one batch, greedy, 20 tokens."""
    model, tokenizer = llama.load(FOLDER)
    peer = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [tokenizer.chat(chat) for chat in chats]
    assert prompts == [theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
                       for chat in chats]
    answers = llama.generate(model, prompts, 1, 20, temperature=0).ids
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(model.logits(ids), peer(ids).logits, rtol=1e-4, atol=1e-3)
        expected = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=20, pad_token_id=0)[0, len(prompt):].tolist()
        assert answer == expected
    assert "Paris" in tokenizer.decode(answers[0])
