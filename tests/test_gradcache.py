"""The gradient cache: the gradient of the whole batch, dropout replayed, whatever the model is wrapped in."""

import peft
import pytest
import torch
from accelerate import Accelerator

from hf_modx import ModXTrainer, ModXTrainingArguments
from hf_modx.embeddings import embed_pairs
from hf_modx.gradcache import GradientCache, join_batches
from hf_modx.losses import info_nce

from tiny import tiny_clip, tiny_pairs, tiny_processor

# transformers 5.23 has a new name for it.
CHECKPOINTING = {"activation_checkpointing": True}
if "activation_checkpointing" not in ModXTrainingArguments.__dataclass_fields__:
    CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def with_dropout(model, share=0.3):
    model.config.text_config.attention_dropout = model.config.vision_config.attention_dropout = share
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = share
    return model


def batch_of(processor, rows=10):
    data = tiny_pairs(rows)
    captions = [captions[0] for captions in data["caption"]]
    return dict(processor(text=captions, images=list(data["image"]), padding=True, return_tensors="pt"))


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def cached_gradients(model, batch, chunk_size):
    GradientCache(chunk_size).backward(
        Accelerator(cpu=True),
        model,
        batch,
        embed=lambda chunk: embed_pairs(model, model, chunk),
        loss_of=lambda image, text: info_nce(image, text, model.logit_scale.exp()) + model.logit_scale.square(),
    )
    return gradients(model)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
def test_gradient_is_that_of_the_whole_batch(processor, chunk_size):
    model = tiny_clip(processor).double()
    batch = batch_of(processor)
    whole = embed_pairs(model, model, batch)
    (info_nce(whole.image, whole.text, whole.logit_scale) + model.logit_scale.square()).backward()
    expected = gradients(model)
    found = cached_gradients(model, batch, chunk_size)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)


def test_dropout_of_the_first_pass_is_replayed_in_the_second(processor):
    model = with_dropout(tiny_clip(processor).double()).train()
    batch = batch_of(processor)
    torch.manual_seed(5)
    parts = [embed_pairs(model, model, {k: v[at : at + 4] for k, v in batch.items()}) for at in range(0, 10, 4)]
    image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
    (info_nce(image, text, model.logit_scale.exp()) + model.logit_scale.square()).backward()
    expected = gradients(model)
    torch.manual_seed(5)
    found = cached_gradients(model, batch, 4)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
    torch.manual_seed(6)
    other = cached_gradients(model, batch, 4)
    assert any((other[name] - expected[name]).abs().max() > 1e-6 for name in expected)


def test_random_numbers_go_on_as_after_one_pass(processor):
    model = with_dropout(tiny_clip(processor)).train()
    batch = batch_of(processor)
    torch.manual_seed(5)
    cached_gradients(model, batch, 5)
    after_cache = torch.rand(1)
    torch.manual_seed(5)
    for at in (0, 5):
        embed_pairs(model, model, {name: tensor[at : at + 5] for name, tensor in batch.items()})
    assert torch.equal(after_cache, torch.rand(1))


def test_joined_batches_embed_as_they_did_alone(processor):
    model = tiny_clip(processor).double().eval()
    short = dict(processor(text=["a red bar"], images=[tiny_pairs(1)[0]["image"]], return_tensors="pt"))
    long = dict(processor(text=["one triangle in orange"], images=[tiny_pairs(2)[1]["image"]], return_tensors="pt"))
    joined = join_batches([short, long], processor.tokenizer.pad_token_id)
    together = embed_pairs(model, model, joined)
    alone = [embed_pairs(model, model, batch) for batch in (short, long)]
    torch.testing.assert_close(together.text, torch.cat([each.text for each in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.image, torch.cat([each.image for each in alone]), rtol=0, atol=1e-12)


def train(processor, folder, model=None, **changes):
    settings = {
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = ModXTrainer(
        model=tiny_clip(processor) if model is None else model,
        args=ModXTrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=tiny_pairs(48),
        processing_class=processor,
        loss_callbacks="modx",
    )
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(start[name], after[name]) for name in start)
    return after


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.mark.parametrize(
    "changes",
    [{}, CHECKPOINTING, {"bf16": True}, {"freeze_vision_model": True}, {"max_grad_norm": 0.1}],
    ids=["plain", "checkpointing", "bf16", "frozen tower", "clipped"],
)
def test_training_in_chunks_ends_with_the_same_weights(tmp_path, processor, changes):
    plain = train(processor, tmp_path, **changes)
    chunked = train(processor, tmp_path, gradient_cache_chunk_size=3, **changes)
    # Half precision rounds by the shape of the batch.
    assert largest_difference(plain, chunked) < (2e-3 if changes.get("bf16") else 1e-5)


def test_held_batches_are_one_contrastive_batch(tmp_path, processor):
    whole = train(processor, tmp_path)
    held = train(
        processor,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_cache_chunk_size=2,
    )
    assert largest_difference(whole, held) < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapter_is_trained_in_chunks(tmp_path, processor):
    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_clip(processor), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    plain = train(processor, tmp_path, adapted())
    chunked = train(processor, tmp_path, adapted(), gradient_cache_chunk_size=3)
    assert largest_difference(plain, chunked) < 1e-5


def test_accumulation_without_the_cache_warns_that_it_adds_no_negatives(tmp_path, processor, caplog):
    train(processor, tmp_path, gradient_accumulation_steps=2)
    assert "adds no negatives" in caplog.text
    caplog.clear()
    train(processor, tmp_path, gradient_accumulation_steps=2, gradient_cache_chunk_size=4)
    assert "adds no negatives" not in caplog.text


def test_chunk_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_cache_chunk_size must be at least 1"):
        ModXTrainingArguments(output_dir=str(tmp_path), gradient_cache_chunk_size=0)
