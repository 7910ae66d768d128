"""Text prompts for generators that read text: the text of an image, and its embedding."""
