"""What a model is asked for when it writes its own prompts: first words of questions, and tasks over texts."""

from __future__ import annotations

FIRST_WORDS: dict[str, tuple[str, ...]] = {
    "free": ("", "", "What", "How", "Why", "Which", "When did", "Who", "Is it", "Can you", "Could you", "I", "I'm",
             "My", "Give me", "Suggest", "Compare", "List", "Should I", "In", "If", "Please", "Help me", "Calculate"),
    "explanation": ("Explain", "Explain how", "Describe", "Define", "What is the difference between",
                    "What are the causes of", "How does", "Teach me", "Tell me about"),
    "story": ("Write a story about", "Write a poem about", "Tell me a story", "Write a dialogue between", "Imagine",
              "Create a character", "Write a letter to", "Write the beginning of a"),
    "code": ("Write a Python function that", "Write a program", "Write a SQL query", "Write a JavaScript function",
             "How do I implement", "Write a shell script"),
}  # fmt: skip
"""By kind, what a user turn begins with; the model continues it."""

TEXT_REQUESTS = (
    "Write a short article about", "Write a news report about", "Write an email to", "Write a paragraph about",
    "Write a product review of", "Write a biography of", "Write a recipe for", "Write a report on",
    "Write a short story about", "Write a description of", "Write meeting notes about", "Write a blog post about",
)  # fmt: skip
"""First words of requests whose answers become the texts of tasks."""
CODE_REQUESTS = ("Write a Python function that", "Write a Python class for", "Write a JavaScript function that")

TEXT_TASKS: dict[str, tuple[str, ...]] = {
    "summary": ("Summarize the following text in one sentence.", "Summarize this text in three bullet points.",
                "Give this text a title and a short summary.", "What are the main points of the text below?"),
    "answer": ("Answer from the text below: what is it about, and who or what is named in it?",
               "Using only the text below, write three questions and their answers.",
               "Which facts does the following text state? Quote them."),
    "extraction": ("Extract the key facts from the text as JSON.",
                   "List all names, places and dates of the following text as a JSON object.",
                   "Return a JSON object with the fields title, topic and keywords for this text."),
    "edit": ("Rewrite the following text more formally.", "Correct the grammar and spelling of this text.",
             "Rewrite this text in simpler words.", "Change the following text to the past tense.",
             "Shorten the following text by half.", "Repeat the following text as a bulleted list."),
    "translation": ("Translate the following text to French.", "Translate this text to Spanish.",
                    "Translate the text below to German."),
}  # fmt: skip
"""By kind, instructions over a text."""
CODE_TASKS: dict[str, tuple[str, ...]] = {
    "summary": ("Explain what this code does.", "Write a docstring for the following code."),
    "answer": ("What does this code return for an empty input?", "Does the following code have a bug? Explain."),
    "edit": ("Add comments to this code.", "Add type hints and error handling to the following code.",
             "Rename the variables of this code to clearer names.", "Write tests for this code."),
    "translation": ("Translate this code to JavaScript.", "Rewrite the following code in Java."),
}  # fmt: skip
"""By kind, instructions over code."""

FREE_SHARES = {"free": 0.5, "explanation": 0.2, "story": 0.15, "code": 0.15}
"""Shares of the prompts that are no tasks over texts."""
TASK_SHARE = 0.4
"""Share of tasks over texts among all prompts."""
CODE_SHARE = 0.2
"""Share of code among the texts."""
TASKS_PER_TEXT = 2
