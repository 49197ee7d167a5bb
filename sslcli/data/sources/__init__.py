"""Data sets: folders, lists, torchvision, Hugging Face, generated shapes, several modalities; their labels."""
