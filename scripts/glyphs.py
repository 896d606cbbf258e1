"""Glyph images for pre-training, drawn from the fonts that matplotlib ships.

`build_bank` draws every usable character of every usable font once, at one size. `GlyphSampler` then makes batches
from that bank: stroke thickness, slant, elastic bends, low resolution, contrast and noise are drawn afresh each time,
for the whole batch at once. No character that stands for a number is ever drawn into the bank, nor one that can
hardly be told from a digit.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


CELL = 48  # side of a bank image in pixels
INK = 40  # longer side of the glyph inside it
FONTS = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)
# Computer Modern has its own code points outside the ASCII letters.
LETTER_FONTS = ("cmb10.ttf", "cmmi10.ttf", "cmr10.ttf", "cmss10.ttf", "cmti10.ttf", "cmtt10.ttf")
ASCII_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
# Whole words of Unicode names: a letter named after a number looks like one, and a playing card shows one.
NUMBER_WORDS = frozenset("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN TRESILLO CUATRILLO".split())
NUMBER_WORDS |= {"DIGIT", "NUMBER", "NUMERAL", "NUMERIC", "PLAYING", "DIE", "DOMINO", "MAHJONG"}
# Long tables of line and dot patterns that say little about writing.
TABLES = ("BOX DRAWINGS", "BRAILLE", "HEXAGRAM")


@dataclass
class GlyphBank:
    """Glyphs drawn once: `images` (glyphs, 48, 48) uint8 ink, `labels` (glyphs,) class, `fonts` (glyphs,) font number.

    `classes[label]` holds the characters that share the class; `font_names[number]` the file name of the font.
    """

    images: torch.Tensor
    labels: torch.Tensor
    fonts: torch.Tensor
    classes: list[str]
    font_names: list[str]

    def split(self, font_name: str) -> tuple["GlyphBank", "GlyphBank"]:
        """All glyphs but those of one font, and those of that font. Raises ValueError for a font not in the bank."""
        if font_name not in self.font_names:
            raise ValueError(f"font_name={font_name!r} is not in the bank; take one of {self.font_names}.")
        held_out = self.fonts == self.font_names.index(font_name)
        parts = (
            GlyphBank(self.images[rows], self.labels[rows], self.fonts[rows], self.classes, self.font_names)
            for rows in (~held_out, held_out)
        )
        first, second = parts
        return first, second


def is_numeric(character: str) -> bool:
    """Whether a character stands for a number in any script, or holds one, as the sign for square metres does."""
    spelled = character + unicodedata.normalize("NFKC", character)
    if any(unicodedata.category(part).startswith("N") for part in spelled):
        return True
    words = unicodedata.name(character, "").replace("-", " ").split()
    return unicodedata.numeric(character, None) is not None or not NUMBER_WORDS.isdisjoint(words)


def is_wanted(character: str) -> bool:
    """Whether a character is a named letter, symbol or punctuation mark without an accent, and no number."""
    if unicodedata.category(character)[0] not in "LSP" or not unicodedata.name(character, "") or is_numeric(character):
        return False
    # An accent is lost in a blurred 32-pixel image, so accented letters would only be label noise.
    return len(unicodedata.normalize("NFD", character)) == 1 and not unicodedata.name(character).startswith(TABLES)


def class_key(character: str) -> str:
    """The character a class is named after: styled letters (script, fraktur, full width) go with the plain one."""
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 and unicodedata.category(character)[0] == "L" else character


def font_folder() -> Path:
    """The folder with matplotlib's TrueType fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_characters(path: Path) -> list[str]:
    """The characters a font file has a glyph for, in code point order."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        characters = [chr(code) for code in sorted(font.getBestCmap())]
    return [c for c in characters if c in ASCII_LETTERS] if path.name in LETTER_FONTS else characters


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Ink of one character, (48, 48) uint8, its longer side 40 pixels and centred; None where there is no ink."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = INK / max(ink.size)
    ink = ink.resize((max(2, round(ink.width * scale)), max(2, round(ink.height * scale))), Image.Resampling.BOX)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(ink, ((CELL - ink.width) // 2, (CELL - ink.height) // 2))
    return np.asarray(cell)


def _shape(images: np.ndarray) -> torch.Tensor:
    """Blurred, centred and normalised ink of shape (glyphs, 256): a dot product is a correlation of shapes."""
    pooled = F.avg_pool2d(torch.from_numpy(images).float().unsqueeze(1), 3).flatten(1)
    return F.normalize(pooled - pooled.mean(dim=1, keepdim=True), dim=1)


def build_bank(
    letter_fonts: int = 8, symbol_fonts: int = 14, same_shape: float = 0.94, max_classes: int | None = None
) -> GlyphBank:
    """Draw the bank: every wanted letter (other character) that at least `letter_fonts` (`symbol_fonts`) fonts have.

    Characters whose shapes correlate by more than `same_shape` in their first font (Latin, Greek and Cyrillic A; c
    and C, as all glyphs have one size) share a class; those that correlate so with a digit are left out.
    `max_classes` keeps the first classes only, for a quick try.
    """
    folder = font_folder()
    font_names = [*FONTS, *LETTER_FONTS]
    characters = {name: font_characters(folder / name) for name in font_names}
    counts: dict[str, int] = {}
    for name in font_names:
        for character in characters[name]:
            counts[character] = counts.get(character, 0) + 1
    needed = {"L": letter_fonts, "S": symbol_fonts, "P": symbol_fonts}
    wanted = {c for c, count in counts.items() if is_wanted(c) and count >= needed[unicodedata.category(c)[0]]}

    drawn: list[tuple[str, int, np.ndarray]] = []
    digit_images: list[np.ndarray] = []
    for number, name in enumerate(font_names):
        font = ImageFont.truetype(str(folder / name), 64)
        for character in characters[name]:
            image = draw_glyph(font, character) if character in wanted else None
            if image is not None:
                drawn.append((class_key(character), number, image))
        if name in FONTS:
            digit_images += [image for digit in "0123456789" if (image := draw_glyph(font, digit)) is not None]

    first: dict[str, np.ndarray] = {}
    for key, _, image in drawn:
        first.setdefault(key, image)
    keys = list(first)
    shapes = _shape(np.stack([first[key] for key in keys]))
    like_digit = (shapes @ _shape(np.stack(digit_images)).T).amax(dim=1) > same_shape
    alike = shapes @ shapes.T > same_shape
    label_of: dict[str, int] = {}
    heads: list[int] = []
    classes: list[str] = []
    for row, key in enumerate(keys):
        if like_digit[row]:
            continue
        label = next((label for label, head in enumerate(heads) if alike[row, head]), None)
        if label is None and (max_classes is None or len(classes) < max_classes):
            label = len(classes)
            heads.append(row)
            classes.append("")
        if label is not None:
            label_of[key] = label
            classes[label] += key

    kept = [entry for entry in drawn if entry[0] in label_of]
    return GlyphBank(
        images=torch.from_numpy(np.stack([image for _, _, image in kept])),
        labels=torch.tensor([label_of[key] for key, _, _ in kept]),
        fonts=torch.tensor([number for _, number, _ in kept]),
        classes=classes,
        font_names=font_names,
    )


class GlyphSampler:
    """An endless, seeded stream of batches `(pixel_values, labels)` from a bank.

    `pixel_values` is (batch, 3, image_size, image_size) in [-1, 1], one grey channel repeated; `labels` is (batch,).
    Classes are drawn uniformly, then one of the glyphs of each class. `strength`, from 0 to 1, scales every random
    change and may be set between batches: a transformer finds its feet much sooner on plain print.
    """

    def __init__(self, bank: GlyphBank, batch_size: int = 128, image_size: int = 32, seed: int = 0):
        self.bank = bank
        self.batch_size = batch_size
        self.image_size = image_size
        self.strength = 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.argsort(bank.labels, stable=True)
        present, self.class_sizes = torch.unique(bank.labels, return_counts=True)
        self.class_starts = torch.cumsum(self.class_sizes, 0) - self.class_sizes
        self.num_present = len(present)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            picked = torch.randint(self.num_present, (self.batch_size,), generator=self.generator)
            offset = (self._uniform(self.batch_size) * self.class_sizes[picked]).long()
            rows = self.order[self.class_starts[picked] + offset]
            ink = self.bank.images[rows].unsqueeze(1).float() / 255
            grey = self._shade(self._low_resolution(self._place(self._thickness(ink))))
            yield (grey * 2 - 1).expand(-1, 3, -1, -1), self.bank.labels[rows]

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _thickness(self, ink: torch.Tensor) -> torch.Tensor:
        """Thicker or thinner strokes, each image by its own amount; thinning stops short of losing hairlines."""
        amount = self._uniform(len(ink), 1, 1, 1, low=-0.6, high=1.6) * self.strength
        thick = F.max_pool2d(ink, 3, 1, 1)
        thicker = F.max_pool2d(thick, 3, 1, 1)
        thin = -F.max_pool2d(-ink, 3, 1, 1)
        out = torch.where(amount < 0, ink + amount * (ink - thin), ink + amount.clamp(0, 1) * (thick - ink))
        return out + (amount - 1).clamp(min=0) * (thicker - thick)

    def _place(self, ink: torch.Tensor) -> torch.Tensor:
        """Random size, proportions, slant, rotation, place and elastic bend; (batch, 1, image_size, image_size)."""
        n, strength = len(ink), self.strength
        height = 1 + strength * self._uniform(n, low=-0.5, high=0.05)
        width = (height * torch.exp(strength * self._uniform(n, low=-0.5, high=0.25))).clamp(max=1.05)
        angle, slant = self._normal(n) * 0.17 * strength, self._normal(n) * 0.2 * strength
        cos, sin = torch.cos(angle), torch.sin(angle)
        forward = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
        shape = torch.stack([torch.stack([width, slant * height], -1), torch.stack([0 * height, height], -1)], 1)
        inverse = torch.linalg.inv(forward @ shape) * (INK / CELL)
        room = torch.stack([(1 - width).clamp(min=0.05), (1 - height).clamp(min=0.05)], -1)
        shift = self._uniform(n, 2, low=-1.0, high=1.0) * room
        axis = (torch.arange(2 * self.image_size) + 0.5) / self.image_size - 1
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        bend = self._normal(n, 2, 5, 5) * self._uniform(n, 1, 1, 1, high=0.11 * strength)
        bend = F.interpolate(bend, size=grid.shape[:2], mode="bicubic").permute(0, 2, 3, 1)
        points = (grid - shift[:, None, None] + bend) @ inverse.transpose(1, 2)[:, None]
        # Sampled at twice the size and averaged, so that small glyphs do not alias.
        return F.avg_pool2d(F.grid_sample(ink, points, align_corners=False), 2)

    def _low_resolution(self, ink: torch.Tensor) -> torch.Tensor:
        """Up to half of the batch as if scanned at 7 to 16 pixels and blown up again, by one of three interpolations."""
        ink = ink.clone()
        group = max(len(ink) // 8, 1)
        for start in range(0, min(round(4 * self.strength) * group, len(ink)), group):
            size = int(torch.randint(7, 17, (), generator=self.generator))
            mode = ("bilinear", "bicubic", "nearest")[int(torch.randint(3, (), generator=self.generator))]
            small = F.interpolate(ink[start : start + group], size=(size, size), mode="area")
            ink[start : start + group] = F.interpolate(small, size=ink.shape[2:], mode=mode)
        return ink.clamp(0, 1)

    def _shade(self, ink: torch.Tensor) -> torch.Tensor:
        """Gamma, a rubbed-out spot, ink and paper greys (either may be the lighter), a sloping paper, noise."""
        n, size, strength = len(ink), self.image_size, self.strength
        ink = ink ** torch.exp(strength * self._uniform(n, 1, 1, 1, low=-0.5, high=0.5))
        axis = torch.arange(size)
        spot = self._uniform(n, 2, high=float(size))
        reach = self._uniform(n, low=1.0, high=5.0)[:, None] * (self._uniform(n, 1) < 0.25 * strength)
        rows, columns = ((axis - spot[:, i : i + 1]).abs() < reach for i in (0, 1))
        ink = ink * ~(rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        paper = self._uniform(n, 1, 1, 1, high=0.35)
        pen = self._uniform(n, 1, 1, 1, low=0.65)
        clean = self._uniform(n, 1, 1, 1) < 1 - 0.6 * strength
        paper, pen = torch.where(clean, 0.0, paper), torch.where(clean, 1.0, pen)
        slope = self._normal(n, 2) * 0.12
        ramp = (axis + 0.5) / size * 2 - 1
        light = slope[:, :1, None] * ramp[None, :, None] + slope[:, 1:, None] * ramp[None, None, :]
        grey = paper + (pen - paper) * ink + torch.where(clean, 0.0, light.unsqueeze(1))
        invert = self._uniform(n, 1, 1, 1) < 0.5 * strength
        grey = torch.where(invert, 1 - grey, grey)
        noise = self._uniform(n, 1, 1, 1, high=0.1 * strength) * torch.where(clean, 0.3, 1.0)
        return (grey + noise * self._normal(n, 1, size, size)).clamp(0, 1)
