"""A byte-level tokenizer, and a tiny random checkpoint on disk to go with it: real files, no download."""

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS = 256
VOCAB = 300  # more than the tokenizer's 257, as with most models


def byte_tokenizer():
    """A Transformers tokenizer with one token per byte and <eos> as 256."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dspark_serve.text import _byte_alphabet

    rust = Tokenizer(models.BPE(vocab={char: byte for char, byte in _byte_alphabet().items()}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(vocab=VOCAB, **changes):
    """A two-layer Llama, sharp enough when random that its text is not one repeated token."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        **changes,
    )


def write_tiny_model(directory, tokenizer=True, seed=0):
    """Save a random tiny_config model, with or without a tokenizer; returns the directory."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(eos_token_id=EOS, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(directory)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return directory
