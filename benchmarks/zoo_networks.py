"""Networks of other packages for zoo.py, with random weights and at small sizes: a name, what builds it, its input.

The packages are no requirement of the project: a source whose package is missing is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Network(NamedTuple):
    """What builds a network, and inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def _images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side)


TIMM = {
    64: """resnet18 resnet26d resnetv2_50 seresnext26d_32x4d resnest14d skresnet18 res2net50_26w_4s res2next50 dla34
        dla46x_c dpn48b densenet121 vgg11_bn mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_100
        mobilenetv4_conv_small_050 mobilenetv4_hybrid_medium efficientnet_b0 tf_efficientnet_lite0 tf_efficientnet_b0
        tf_efficientnetv2_b0 efficientnetv2_rw_t mixnet_s mnasnet_small fbnetc_100 fbnetv3_b spnasnet_100 ghostnet_050
        ghostnetv2_100 hardcorenas_a hrnet_w18_small regnetx_002 regnety_002 regnetz_005 repvgg_a0 rexnet_100
        selecsls42b cspresnet50 cspdarknet53 darknet53 gernet_s lcnet_050 tinynet_e nf_regnet_b0 nf_resnet26
        eca_resnet33ts convnext_atto convnextv2_atto edgenext_xx_small mambaout_femto inception_next_atto
        poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 efficientvit_b0 mobileone_s0 repghostnet_050
        repvit_m0_9 starnet_s1 hgnet_tiny hgnetv2_b0 ese_vovnet19b_dw vovnet39a fasternet_t0 rdnet_tiny xception41
        inception_v4 tresnet_m""",
    128: "mobilevit_xxs mobilevitv2_050 fastvit_t8 shvit_s1 swiftformer_xs",
    224: """lambda_resnet26t botnet26t_256 focalnet_tiny_srf efficientformer_l1 efficientformerv2_s0 efficientvit_m0
        levit_128s tiny_vit_5m_224 vit_tiny_patch16_224
        deit_tiny_patch16_224 vit_small_patch32_224 eva02_tiny_patch14_224
        cait_xxs24_224 xcit_nano_12_p16_224 coat_lite_tiny convit_tiny crossvit_tiny_240 pit_ti_224 pvt_v2_b0
        twins_svt_small swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 nest_tiny maxvit_rmlp_pico_rw_256
        mvitv2_tiny hiera_tiny_224 gcvit_xxtiny davit_tiny nextvit_small mixer_s32_224 gmlp_ti16_224 resmlp_12_224
        volo_d1_224 sequencer2d_s visformer_tiny tnt_s_patch16_224""",
}
SIDES = {"botnet26t_256": 256, "lambda_resnet26t": 256, "crossvit_tiny_240": 240, "maxvit_rmlp_pico_rw_256": 256}
ULTRALYTICS = """yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-cls yolov8n-obb yolov8n-ghost
    yolov9t yolov10n yolo11n yolo11n-seg yolo11n-pose yolo11n-cls yolo11n-obb yolo12n yolo12n-seg"""
SEGMENTATION = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
)
ENCODERS = ("resnet18", "mobilenet_v2")

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False}
_VISION = {key: value for key, value in _TEXT.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
_GPT = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_SEGFORMER = {
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "depths": [1, 1, 1, 1],
    "decoder_hidden_size": 16,
}
_AUDIO = _TEXT | {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("text", _TEXT),
    "RobertaModel": ("text", _TEXT),
    "ElectraModel": ("text", _TEXT | {"embedding_size": 32}),
    "AlbertModel": ("text", _TEXT | {"embedding_size": 16}),
    "DistilBertModel": ("text", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "DebertaV2Model": ("text", _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBertModel": ("text", _TEXT | dict.fromkeys(_SPECIAL_TOKENS, 0)),
    "GPT2LMHeadModel": ("text", _GPT | {"n_embd": 32, "n_positions": 64}),
    "OPTForCausalLM": ("text", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False}),
    "GPTNeoXForCausalLM": ("text", _TEXT | {"use_cache": False}),
    "BloomForCausalLM": ("text", _GPT | {"hidden_size": 32}),
    "FalconForCausalLM": ("text", _TEXT | {"use_cache": False}),
    **{
        f"{name}ForCausalLM": ("text", dict(_LLAMA))
        for name in ("Llama", "Mistral", "Qwen2", "StableLm", "Phi", "Phi3", "Olmo2", "Granite")
    },
    **{f"{name}ForCausalLM": ("text", _LLAMA | {"head_dim": 8}) for name in ("Qwen3", "Gemma", "Gemma2", "Glm")},
    "MixtralForCausalLM": ("text", _LLAMA | {"num_local_experts": 4}),
    "T5EncoderModel": ("text", _T5),
    "ViTModel": ("image", dict(_VISION)),
    "DeiTModel": ("image", dict(_VISION)),
    "BeitModel": ("image", dict(_VISION)),
    "Dinov2Model": ("image", _VISION),
    "CLIPVisionModel": ("image", dict(_VISION)),
    "SiglipVisionModel": ("image", dict(_VISION)),
    "SwinModel": ("image", _SWIN),
    "SegformerModel": ("image", _SEGFORMER),
    "ResNetModel": ("image", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}),
    "ConvNextModel": ("image", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "Wav2Vec2Model": ("audio", _AUDIO),
    "HubertModel": ("audio", _AUDIO),
}
_INPUTS: dict[str, Callable[[], Tensor]] = {
    "text": lambda: torch.randint(3, 64, (2, 12)),
    "image": partial(_images, 32),
    "audio": lambda: torch.randn(2, 1600),
}


def timm() -> dict[str, Network]:
    """Return networks of timm."""
    import timm

    known = set(timm.list_models())
    sides = {name: side for side, names in TIMM.items() for name in names.split() if name in known} | SIDES
    return {
        name: Network(partial(timm.create_model, name, pretrained=False), partial(_images, side))
        for name, side in sides.items()
    }


def ultralytics() -> dict[str, Network]:
    """Return YOLO networks, from the YAML files of ultralytics."""
    from ultralytics import YOLO

    return {
        name: Network(lambda name=name: YOLO(f"{name}.yaml").model, partial(_images, 64))  # type: ignore[misc]
        for name in ULTRALYTICS.split()
    }


def transformers() -> dict[str, Network]:
    """Return tiny networks of transformers."""
    import transformers as package

    def build(name: str, options: dict[str, Any]) -> nn.Module:
        kind = getattr(package, name)
        model: nn.Module = kind(kind.config_class(**options))
        return model

    return {
        name: Network(partial(build, name, options), _INPUTS[kind])
        for name, (kind, options) in TRANSFORMERS.items()
        if hasattr(package, name)
    }


def segmentation() -> dict[str, Network]:
    """Return decoders of segmentation-models-pytorch, each with two encoders."""
    import segmentation_models_pytorch as package

    return {
        f"{name}-{encoder}": Network(
            partial(getattr(package, name), encoder, encoder_weights=None, classes=3), partial(_images, 128)
        )
        for name in SEGMENTATION
        for encoder in ENCODERS
    }


def monai() -> dict[str, Network]:
    """Return networks of MONAI, for volumes of 32 voxels a side."""
    from monai.networks import nets

    kernels = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    builders: dict[str, Callable[[], nn.Module]] = {
        "UNet": lambda: nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1),
        "BasicUNet": lambda: nets.BasicUNet(3, 1, 2, (8, 8, 16, 32, 64, 8)),
        "BasicUNetPlusPlus": lambda: nets.BasicUNetPlusPlus(3, 1, 2, (8, 8, 16, 32, 64, 8)),
        "DynUNet": lambda: nets.DynUNet(3, 1, 2, filters=[8, 16, 32], **kernels),
        "AttentionUnet": lambda: nets.AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)),
        "SegResNet": lambda: nets.SegResNet(3, 8),
        "VNet": lambda: nets.VNet(),
        "HighResNet": lambda: nets.HighResNet(3),
        "DenseNet121": lambda: nets.DenseNet121(3, 1, 2),
        "ResNet18": lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2),
        "EfficientNetBN": lambda: nets.EfficientNetBN(
            "efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1
        ),
    }
    return {name: Network(build, lambda: torch.randn(1, 1, 32, 32, 32)) for name, build in builders.items()}


def diffusers() -> dict[str, Network]:
    """Return networks of diffusers."""
    import diffusers as package

    small: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    tiny = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    images = partial(_images, 32)
    return {
        "UNet2DModel": Network(
            lambda: package.UNet2DModel(32, 3, 3, attention_head_dim=8, **unet, **small),
            lambda: {"sample": images(), "timestep": torch.tensor([1, 5])},
        ),
        "AutoencoderKL": Network(lambda: package.AutoencoderKL(**coder, **small), images),
        "VQModel": Network(lambda: package.VQModel(**coder, **small), images),
        "AutoencoderTiny": Network(lambda: package.AutoencoderTiny(**tiny), images),
    }


SOURCES: dict[str, Callable[[], dict[str, Network]]] = {
    "timm": timm,
    "ultralytics": ultralytics,
    "transformers": transformers,
    "segmentation": segmentation,
    "monai": monai,
    "diffusers": diffusers,
}
