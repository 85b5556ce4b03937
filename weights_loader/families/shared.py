"""What the families of Stable Diffusion 1 and 2 have in common: the U-Net's and VAE's names, what files hold besides, what is refused."""

from weights_loader.dialects import (
    TEXT_DIFFUSERS_ALIASES,
    VAE_DIFFUSERS_ALIASES,
    text_clip,
    unet_convolutions,
    unet_diffusers,
    unet_ldm,
    vae_convolutions_ldm,
    vae_diffusers,
    vae_ldm,
)
from weights_loader.name_table import PartNames
from weights_loader.stated import MARKERS

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ROOT = "cond_stage_model."

UNET_LDM = PartNames(unet_ldm, UNET_PREFIX, convolutions=unet_convolutions)
VAE_LDM = PartNames(vae_ldm, VAE_PREFIX, convolutions=vae_convolutions_ldm)
DIFFUSERS = {
    "text_encoder": PartNames(text_clip, "text_model.", aliases=TEXT_DIFFUSERS_ALIASES),
    "unet": PartNames(unet_diffusers, convolutions=unet_convolutions),
    "vae": PartNames(vae_diffusers, aliases=VAE_DIFFUSERS_ALIASES),
}

VARIANTS = {4: "", 9: " inpainting"}
OTHER_VARIANTS = {5: "depth-to-image", 7: "the upscaler", 8: "InstructPix2Pix"}

IGNORED = (
    (
        r"^(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recipm?1?_alphas_cumprod"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights|denoiser\.sigmas)$",
        "tables of the noise schedule, which is computed anew",
    ),
    (r"embeddings\.position_ids$|^cond_stage_model\.model\.attn_mask$", "the numbers 0, 1, 2, ... or the causal mask, made anew"),
    (r"^model_ema\.(decay|num_updates)$", "counters of the training"),
    (r"^model_ema\.", "moving average of the U-Net's weights; ask for it with ema=True (--ema)"),
    (r"^(first_stage_model\.)?loss\.", "the loss that the VAE was trained with"),
    (r"^model_sampling\.", "tables of the noise schedule, which is computed anew"),
    (r"^scale_factor$", "the factor of the latents, read into the config"),
    (
        r"^embedding_manager\.",
        "what old trainers of DreamBooth and new words kept for themselves",
    ),
    (
        r"^(cond_stage_model\.)?(transformer\.|model\.)?(vision_model|visual|visual_projection|vision_projection)\.",
        "CLIP's encoder of pictures, which no prompt passes",
    ),
    (r"^(safety_checker|feature_extractor)\.", "the safety checker, no part of making a picture"),
)
EXTRA = (
    # What CLIP compares pictures and texts with, ...
    r"^(cond_stage_model\.(model\.|transformer\.)?)?(text_model\.)?(text_projection(\.weight)?|logit_scale)$",
    # ... the tensors that say what the model predicts (stated.py), ...
    MARKERS,
    # ... and blocks of the text encoder that are not run: OpenCLIP's last one, and CLIP's where the config has fewer than the file.
    r"^cond_stage_model\.model\.transformer\.resblocks\.(?P<block>\d+)\.",
    r"^(cond_stage_model\.transformer\.)?text_model\.encoder\.layers\.(?P<block>\d+)\.",
)

# The first that is found decides.
REFUSED = (
    (r"^control_model\.|controlnet_cond_embedding\.", "a ControlNet, which steers a model and is none; give it beside one (--controlnet)"),
    (
        r"^conditioner\.embedders\.0\.model\.transformer\.resblocks\.24\.",
        "the refiner of Stable Diffusion XL, which is not supported; load the base",
    ),
    (r"cond_proj\.weight$", "a U-Net that guidance is distilled into (LCM), which is not supported; its LoRA on the base model is"),
    (r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input)$", "a model quantised to 8 bits with scales, which is not supported"),
    (r"^(320|640|768|1024|1280)\.[01]\.linear\.\d+\.", "a hypernetwork of the web interfaces, which is not supported"),
    (r"joint_blocks\.|double_blocks\.|single_transformer_blocks\.", "a diffusion transformer (Stable Diffusion 3, Flux), not supported"),
)
PARTS_ALONE = (
    (r"^unet[./]|^text_encoder[./]", "a whole model in diffusers names in one file; save it as a diffusers folder"),
    (
        r"^(first_stage_model\.)?(en|de)coder\.(down|up|mid)(_blocks?)?\.",
        "a VAE alone; load a whole model and give this as vae=FILE (--vae)",
    ),
    (r"^(down_blocks|mid_block|up_blocks)\.", "the U-Net of a diffusers model alone; give the folder with model_index.json"),
    (
        r"^(text_model\.)?(encoder\.layers|embeddings)\.|^cond_stage_model\.|^conditioner\.embedders\.",
        "a text encoder alone; give the whole model",
    ),
)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline")
# diffusers' classes have more settings than Stable Diffusion uses. What a setting must be; a missing one is diffusers' default.
SETTINGS: dict[str, dict[str, object]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,  # cosines first
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        **dict.fromkeys(("class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds")),
        **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "reverse_transformer_layers_per_block")),
        **dict.fromkeys(("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim")),
        **dict.fromkeys(("projection_class_embeddings_input_dim", "mid_block_only_cross_attention", "cross_attention_norm")),
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "text_encoder": {"model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "scheduler": {"beta_schedule": "scaled_linear", "trained_betas": None, "timestep_type": "discrete", "predict_epsilon": True},
}
