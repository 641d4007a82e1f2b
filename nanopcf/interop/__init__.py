"""The formats and programs of others. Open it to read another kind of model folder or data file.

huggingface    model folders and tokenizers in Hugging Face's layout
chat_template  chat templates, run in a sandbox
turns          begin and end tokens, and tags that a template opens
problems       the shapes in which public data sets store problems, solutions and answers
choices        questions with choices: letters in the prompt, a letter as the answer
"""
