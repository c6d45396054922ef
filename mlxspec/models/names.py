"""Short names for models that fit together: Llama 2 Chat targets and drafters with its tokenizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """``gigabytes`` is what the weights take in memory as ``load`` keeps them by default, on a GPU."""

    name: str
    hub_id: str
    role: str  # "target" or "drafter"
    gigabytes: float
    licence: str
    quantize: str = "none"
    drafter: str | None = None  # of a target: what "auto" drafts with


LLAMA_2 = "Llama 2 Community License"

KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel("llama2-7b-chat", "mlx-community/Llama-2-7b-chat-4-bit", "target", 4.0, LLAMA_2, drafter="amd-135m"),
        KnownModel("llama2-13b-chat", "NousResearch/Llama-2-13b-chat-hf", "target", 7.3, LLAMA_2, "4", "amd-135m"),
        KnownModel("llama2-70b-chat", "NousResearch/Llama-2-70b-chat-hf", "target", 38.8, LLAMA_2, "4", "amd-135m"),
        KnownModel("amd-135m", "amd/AMD-Llama-135m", "drafter", 0.27, "Apache 2.0"),
        KnownModel("llama-160m", "JackFram/llama-160m", "drafter", 0.32, "Apache 2.0"),
        KnownModel("llama-68m-chat", "Felladrin/Llama-68M-Chat-v1", "drafter", 0.14, "Apache 2.0"),
    )
}
