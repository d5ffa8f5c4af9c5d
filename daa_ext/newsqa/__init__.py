"""True/false questions about the user's own news articles (`daa newsqa build`).

    articles    read, filter by date, find duplicates and related articles
    questions   the prompt, what a model's answer must be
    generate    the models that write questions: an OpenAI-compatible endpoint, or a local one
    journal     what is finished, on the disk as soon as it is
    files       the data sets that are made of it
    build       all of it, in order
    command     `daa newsqa build`

Each module imports those above it only.
"""
