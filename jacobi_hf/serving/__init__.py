"""The OpenAI-compatible server of transformers, decoding with Jacobi.

- `app.py`: the application and the server.
- `handlers.py`: requests for chats and completions.
- `requests.py`: fields of a request, checked before anything is generated.
- `generation.py`: the generation of each request, which can be cancelled.
- `text.py`: the text of answers, cut before stop strings.
- `disconnect.py`: requests are cancelled when their client leaves.
- `errors.py`: failures as error objects of the OpenAI API.
"""
