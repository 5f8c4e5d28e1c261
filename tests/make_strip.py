"""Make the moving picture and the clips of the start page: `python tests/make_strip.py`.

A packaged drawn talker, without its sound, goes through the packaged model. Into nbs/images come
strip.gif (silent clip → lips, face, brows → mel → waveform), card.png (its last picture, as social
networks show it), and four clips with posters: silent, spoken, said, and borrowed (the voice of
another face)."""

from pathlib import Path
import matplotlib
import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from faces2voices import FacesToVoices
from faces2voices.figures import BLUE, GREEN, ORANGE
from faces2voices.media import dub, film_sound, write_video

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data_samples"
IMAGES = ROOT / "nbs" / "images"
TALKER = SAMPLES / "t0023_000.mp4"
OTHER = SAMPLES / "t0007_000.mp4"

SIZE = (940, 300)
FRAME_MS = 40  # 25 frames a second, as the clip
HOLD_MS = 2500  # the last picture
COLORS = 192
GREY = "#777777"
DARK = "#222222"
CLIP = (12, 40)  # left, top
LIPS = (300, 40)
FACE = (300, 132)
BROWS = (300, 224)
MEL = (500, 40, 428, 164)  # left, top, width, height
WAVE = (500, 220, 428, 60)


def font(size: int):
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def picture(pixels, size) -> Image.Image:  # (H, W) or (H, W, 3) uint8
    return Image.fromarray(np.asarray(pixels)).convert("RGB").resize(size, Image.LANCZOS)


def mel_picture(mel) -> np.ndarray:  # (80, 4T) ln mel → (height, width, 3)
    "A mel spectrogram in the colours of the lessons."
    level = ((mel.flip(0) + 11.5) / 13).clamp(0, 1).numpy()
    rgb = (255 * matplotlib.colormaps["magma"](level)[..., :3]).astype(np.uint8)
    return np.asarray(picture(rgb, MEL[2:]))


def wave_picture(wav) -> np.ndarray:  # (n,) → (height, width, 3)
    "A waveform: for each column, from its lowest to its highest sample."
    _, _, width, height = WAVE
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    edges = np.linspace(0, len(wav), width + 1).astype(int)
    for x, (start, stop) in enumerate(zip(edges, edges[1:])):
        part = wav[start:stop].numpy() / np.abs(wav.numpy()).max()
        low, high = height / 2 * (1 - part.max()), height / 2 * (1 - part.min())
        draw.line([(x, low), (x, high)], fill=DARK)
    return np.asarray(image)


def arrow(draw, x: int, y: int):
    draw.line([(x, y), (x + 24, y)], fill=GREY, width=3)
    draw.polygon([(x + 24, y - 6), (x + 34, y), (x + 24, y + 6)], fill=GREY)


def stage() -> Image.Image:
    "What does not move."
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    for x, text in ((12, "a silent clip"), (300, "what the model sees"), (500, "what it says")):
        draw.text((x, 10), text, fill=DARK, font=font(17))
    arrow(draw, 258, 160)
    arrow(draw, 448, 160)
    words = (
        (LIPS, BLUE, "lips", "what"),
        (FACE, ORANGE, "face", "who"),
        (BROWS, GREEN, "brows", "how"),
    )
    for (x, y), color, seen, told in words:
        height = 44 if seen == "brows" else 84
        draw.rectangle((x - 3, y - 3, x + 86, y + height + 2), outline=color, width=3)
        middle = y + height // 2
        draw.text((x + 94, middle - 18), seen, fill=DARK, font=font(14))
        draw.text((x + 94, middle), told, fill=GREY, font=font(14))
    return image


def grown(image: Image.Image, whole: np.ndarray, place: tuple, share: float):
    "Paste the first share of a picture; the rest is still to come."
    left, top, width, height = place
    seen = whole.copy()
    seen[:, round(share * width) :] = 0xEE
    image.paste(Image.fromarray(seen), (left, top))


def strip(speech) -> list:
    "The pictures of the strip, one a frame."
    video, _, crops = speech.preprocessed
    T = len(crops.lips)
    frames = list(video.frames)[:T]
    mel, wave = mel_picture(speech.mel), wave_picture(speech.wav)
    brows = (255 * crops.expression.reshape(T, 24, 48)).astype(np.uint8)
    found = []
    for t in range(T):
        image = stage()
        image.paste(picture(frames[t], (236, 236)), CLIP)
        image.paste(picture(crops.lips[t], (84, 84)), LIPS)
        image.paste(picture(crops.face, (84, 84)), FACE)
        image.paste(picture(brows[t], (84, 42)), BROWS)
        grown(image, mel, MEL, (t + 1) / T)
        grown(image, wave, WAVE, (t + 1) / T)
        found.append(image)
    return found


def save_gif(path: Path, images: list):
    "One palette for all pictures, so that what stands still costs nothing."
    sample = Image.new("RGB", (SIZE[0], 4 * SIZE[1]))
    for i, image in enumerate((images[0], images[len(images) // 2], images[-1])):
        sample.paste(image, (0, i * SIZE[1]))
    for i, color in enumerate((BLUE, GREEN, ORANGE)):  # thin lines that a palette would forget
        sample.paste(color, (300 * i, 3 * SIZE[1], 300 * (i + 1), 4 * SIZE[1]))
    palette = sample.quantize(COLORS, method=Image.MEDIANCUT)
    pages = [image.quantize(palette=palette, dither=Image.NONE) for image in images]
    times = [FRAME_MS] * (len(pages) - 1) + [HOLD_MS]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)


def save_card(path: Path, image: Image.Image):
    "The strip on a card of 1200 × 630, the size that social networks show."
    card = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(card)
    draw.text((60, 60), "faces2voices", fill=BLUE, font=font(64))
    draw.text((60, 150), "From a silent face to its voice", fill=DARK, font=font(32))
    card.paste(image.resize((1080, 345), Image.LANCZOS), (60, 235))
    card.save(path, optimize=True)


def save_poster(path: Path, frame, sound: bool, face=None):
    "A frame with a mark: a triangle, or a crossed loudspeaker where there is no sound."
    image = picture(frame, (240, 240))
    draw = ImageDraw.Draw(image)
    if face is not None:
        draw.rectangle((155, 5, 234, 84), fill=ORANGE)
        image.paste(picture(face, (74, 74)), (158, 8))
    draw.ellipse((8, 184, 56, 232), fill="white", outline=DARK, width=2)
    if sound:
        draw.polygon([(26, 196), (26, 220), (46, 208)], fill=DARK)
    else:
        draw.polygon([(18, 202), (25, 202), (34, 194), (34, 222), (25, 214), (18, 214)], fill=DARK)
        draw.line([(38, 202), (48, 214)], fill=DARK, width=3)
        draw.line([(48, 202), (38, 214)], fill=DARK, width=3)
    image.save(path, quality=88)


def main():
    f2v = FacesToVoices.from_pretrained("talkers", device="cpu")
    speech = f2v(TALKER, seed=0)
    borrowed = f2v(TALKER, seed=0, face=OTHER)
    frames = list(speech.preprocessed.video.frames)
    images = strip(speech)
    save_gif(IMAGES / "strip.gif", images)
    save_card(IMAGES / "card.png", images[-1])
    write_video(IMAGES / "silent.mp4", frames, overwrite=True)
    speech.dub(IMAGES / "spoken.mp4", overwrite=True)
    borrowed.dub(IMAGES / "borrowed.mp4", overwrite=True)
    (IMAGES / "said.mp4").write_bytes(TALKER.read_bytes())
    middle = frames[len(frames) // 2]
    other = f2v.preprocess(OTHER)[1].crops.face
    for name in ("silent", "spoken", "said", "borrowed"):
        face = other if name == "borrowed" else None
        save_poster(IMAGES / f"{name}.jpg", middle, name != "silent", face)
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.stat().st_size:>9,} {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
