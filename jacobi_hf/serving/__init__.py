"""The OpenAI-compatible server of transformers, decoding with Jacobi.

- `app.py`: the application and the server.
- `handlers.py`: requests for chats and completions.
- `requests.py`: fields of a request, checked before anything is generated.
- `fields.py`: fields without effect, and fields that are refused, with the reasons.
- `messages.py`: messages and tools of a chat, checked, and as chat templates read them.
- `several.py`: answers with several choices.
- `penalties.py`: frequency and presence penalty.
- `generation.py`: the generation of each request, which can be cancelled.
- `text.py`: the text of answers, cut before stop strings.
- `disconnect.py`: requests are cancelled when their client leaves.
- `errors.py`: failures as error objects of the OpenAI API.
"""
