"""`dist-subspace generate`: one prompt, a chat, or a file of prompts."""
