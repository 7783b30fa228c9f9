"""Log-probabilities of responses: caps, padding, and wrappers."""

import pytest
import tiny
import torch

from reinforcepp.models.logprobs import response_logprobs, takes_left_padding


def test_logit_caps_are_applied():
    model = tiny.model()
    forward = type(model).forward

    def capped(self, *arguments, **named):
        output = forward(self, *arguments, **named)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped.__get__(model)
    prompt, response = [5, 6, 7], [20, 21, 0]
    actual, _, _ = response_logprobs(model, [prompt], [response], pad_id=0)
    logits = model(torch.tensor([prompt + response])).logits[0, 2:-1]
    torch.testing.assert_close(actual[0], logits.log_softmax(-1)[range(3), response], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_padded_log_probabilities_equal_unpadded_ones(family):
    """Rows of different lengths, batched and alone; EOS, which is also the pad token, counts."""
    model = tiny.model(family)
    prompts, responses = [[5, 6, 7, 8, 9, 10], [11, 12]], [[20, 0], [21, 22, 23, 24, 0]]
    with torch.no_grad():
        together, entropy, mask = response_logprobs(model, prompts, responses, pad_id=0, temperature=0.7, width=9)
        assert mask.sum(-1).tolist() == [2, 5] and together.shape == entropy.shape == (2, 9)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1)[range(len(response)), response]
            torch.testing.assert_close(together[i, : len(response)], expected, atol=2e-5, rtol=0)


def test_a_model_that_only_keeps_the_configuration_of_an_adapter_is_its_own_base():
    model = tiny.model()
    model.peft_config = {}
    assert takes_left_padding(model)
