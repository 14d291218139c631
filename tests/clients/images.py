"""Models of images, asked as the clients of Hugging Face and Cohere do."""

import base64

import cohere
import numpy
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

import expected
from judging import raises
from models import FIXTURES, safetensors

# Of a forward of f32 on both sides, on pictures that were read and resized by different code.
LEAST_COSINE = 0.9999


class HuggingFaceImages:
    client, model = "huggingface_hub", expected.FLOWERS

    def __init__(self, url):
        self.hub = InferenceClient(model=url, timeout=60)

    def test_image_classification(self):
        [asked] = expected.flowers()
        for name, file, scores in zip(expected.PICTURES, asked.inputs["image"], asked.outputs["scores"]):
            wanted = dict(zip(self.model.labels, scores))
            for image in (file, str(FIXTURES / "vision/images" / name)):
                found = self.hub.image_classification(image)
                assert [element.score for element in found] == sorted((element.score for element in found), reverse=True), found
                assert sorted(element.label for element in found) == sorted(wanted), found
                assert all(abs(element.score - wanted[element.label]) < expected.PICTURE_TOLERANCE for element in found), (found, wanted)
            best = max(wanted, key=wanted.get)
            assert [element.label for element in self.hub.image_classification(file, top_k=1)] == [best], best
        error = raises(HfHubHTTPError, lambda: self.hub.image_classification(b"no image"))
        assert error.response.status_code == 422, error


class CohereImages:
    client, model = "cohere", expected.CLIP

    def __init__(self, url):
        self.cohere = cohere.ClientV2(base_url=url, api_key="none", timeout=60, max_retries=0)
        self.references = safetensors("vision/references.safetensors")

    def embed(self, **asked):
        answer = self.cohere.embed(model=self.model.name, embedding_types=["float"], **asked)
        return [numpy.asarray(row) for row in answer.embeddings.float_]

    def close(self, row, name):
        wanted = self.references[f"{self.model.name}/{name}"]
        cosine = row @ wanted / (numpy.linalg.norm(row) * numpy.linalg.norm(wanted))
        assert row.shape == wanted.shape and cosine >= LEAST_COSINE, (name, row.shape, cosine)

    def test_embeds_images(self):
        for name, kind in (("photo.png", "png"), ("photo.jpg", "jpeg"), ("photo.webp", "webp"), ("grey.png", "png")):
            url = f"data:image/{kind};base64,{base64.b64encode(expected.picture(name)).decode()}"
            [row] = self.embed(images=[url], input_type="image")
            self.close(row, f"{name}/row")
        error = raises(cohere.UnprocessableEntityError, lambda: self.embed(images=["data:image/png;base64,aGk="], input_type="image"))
        assert "no PNG, JPEG or WebP" in error.body["message"], error.body

    def test_embeds_texts_of_the_same_model(self):
        rows = self.embed(texts=["the harbour master", "a"], input_type="search_query")
        for i, row in enumerate(rows):
            self.close(row, f"text/{i}")
