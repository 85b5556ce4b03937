"""The JSON files of a diffusers folder: reading.py makes a ModelConfig of them, writing.py writes them from one."""

from weights_loader.folder.reading import INDEX, folder_config, folder_family, vae_config
from weights_loader.folder.settings import read_json
from weights_loader.folder.writing import write_folder_config

__all__ = ["INDEX", "folder_config", "folder_family", "read_json", "vae_config", "write_folder_config"]
