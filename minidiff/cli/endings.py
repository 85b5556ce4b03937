"""How a command ends that has made a file: what it is, how to use it, and which other programs read it.

Standard output has the path alone, for scripts; the rest is on standard error.
"""

from pathlib import Path

from minidiff.cli.model import print_notes

WEB = "AUTOMATIC1111, Forge, ComfyUI"
# Who reads a file beside minidiff, by the flag that takes it and the spelling of its names; by "" where there is but one.
READERS = {
    ("--lora", "kohya"): f"{WEB}, kohya's scripts, diffusers (load_lora_weights)",
    ("--lora", "diffusers"): "diffusers (load_lora_weights), peft",
    ("--embedding", "diffusers"): "diffusers (load_textual_inversion)",
    ("--embedding", "a1111"): f"{WEB}, diffusers (load_textual_inversion)",
    ("--embedding", "kohya"): f"{WEB}, diffusers (load_textual_inversion)",
    ("--custom-diffusion", "minidiff"): "no other program; `minidiff convert FILE FOLDER` makes diffusers' folder of it",
    ("--custom-diffusion", "diffusers"): "diffusers (load_attn_procs, load_textual_inversion)",
    ("--custom-diffusion", "original"): "the authors' program",
    ("--controlnet", "original"): f"{WEB}, diffusers (ControlNetModel.from_single_file)",
    ("--controlnet", "diffusers"): "diffusers (ControlNetModel.from_pretrained)",
    ("--model", "ldm"): f"{WEB}, diffusers (from_single_file)",
    ("--model", "diffusers"): "diffusers (from_pretrained)",
}
OWN_SIZE = "minidiff alone, whose own the bundled model is, and diffusers beside the folder that `minidiff convert tiny FOLDER` makes"


def readers(flag: str, names: str, family: str = "sd1") -> str:
    """Return who else reads a file that a flag of generate takes.

    names: the spelling of the file. family: of the model it is for, as `family_of` says; no web interface knows the bundled one.
    """
    known = READERS.get((flag, names)) or next((who for (one, _), who in READERS.items() if one == flag), "")
    return OWN_SIZE if family == "bundled" and known else known


def finish(path: Path, what: str = "", use: str = "", read_by: str = "") -> None:
    """Print the path of what was made, and on standard error its size and how it is used.

    Args:
        path: of the file or folder
        what: it is
        use: a command to give next, which uses it
        read_by: other programs that read it
    """
    said = [f"{path}: {', '.join(part for part in (size_of(path), what) if part)}"]
    said += [f"next: {use}"] * bool(use) + [f"read by: {read_by}"] * bool(read_by)
    print_notes(said)
    print(path)


def size_of(path: Path) -> str:
    """Return the size of a file, or of all files of a folder, as "1.5 MB"."""
    from minidiff.markdown import format_bytes

    return format_bytes(sum(one.stat().st_size for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file()))
