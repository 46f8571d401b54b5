"""The vision demo's processor and its untrained model, for `train_demo.py --vision`."""

import math
from itertools import islice

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from structprune.demo.scenes import PATCH, SIDE
from structprune.demo.sights import prompt_of, visual_questions

TOKENS = (SIDE // PATCH) ** 2  # of a picture
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(seed: int) -> LlavaProcessor:
    """Return the processor: every word of the questions is a token, and any other text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\s+| ?[^\sA-Za-z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<s>", "</s>", "<pad>", AddedToken("<image>", special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"{prompt_of(one.question)} {one.answer}" for one in islice(visual_questions(seed), 5000)]
    tokenizer.train_from_iterator([text.replace("<image>", "") for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=half,
        image_std=half,
    )
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Build the untrained model; as in LLaVA-1.5 the tower's last block is there and not used."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    tower = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    language = LlamaConfig(
        vocab_size=16 * math.ceil(len(tokenizer) / 16),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        # Slow turns: over a picture's tokens most of a query and a key still tells what, not where.
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    start_alike(model)
    return model


@torch.no_grad()
def start_alike(model: LlavaForConditionalGeneration) -> None:
    """Let a word be read as it is written, and like attend to like and pass it on, before any training."""
    words = model.get_input_embeddings().weight.normal_(std=0.2)
    model.lm_head.weight.copy_(words / 2)
    for block in model.model.language_model.layers:
        attention = block.self_attn
        for source, target, std in (("k_proj", "q_proj", 0.06), ("v_proj", "o_proj", 0.05)):
            drawn = getattr(attention, source).weight.normal_(std=std).unflatten(0, (-1, attention.head_dim))
            shared = drawn.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
            getattr(attention, target).weight.copy_(shared if target == "q_proj" else shared.T)
