"""Receipts: goods, prices, sums."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..splits import EVALUATION
from ..words import company, date, some, word
from .sheet import Sheet

_PRICE = ("What does {item} cost?", "How much is {item}?", "What was paid for {item}?", "Give the price of {item}.")
_SHOP = ("Which shop is this receipt from?", "What is the name of the shop?", "Where was this bought?")
_TOTAL = ("What is the total?", "How much was paid in all?", "Which amount stands beside Total?")
_DATE = ("When was this bought?", "What is the date on the receipt?", "On which day was this paid?")
_CASHIER = ("Who was the cashier?", "Which cashier is named?")
_DEAREST = ("What is the most expensive item?", "Which item costs most?", "Name the dearest item.")
_HOW_MANY = ("How many {item} were bought?", "What is the quantity of {item}?")


def money(cents: int) -> str:
    """An amount with two places."""
    return f"{cents // 100}.{cents % 100:02d}"


def draw_receipt(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """A receipt and questions about it; an amount counts with and without its currency."""
    sheet = Sheet(rng, split, narrow=True)
    sheet.text_size = rng.randint(16, sheet.image.width // 26)
    shop, day, cashier = company(rng, split), date(rng), word(rng, "given", split)
    sign = "$" if split == EVALUATION or rng.random() < 0.5 else "EUR "
    sheet.heading(shop, 1.6)
    sheet.line(f"{rng.randint(1, 199)} {word(rng, 'street', split)}, {word(rng, 'city', split)}", sheet.font(0.9))
    sheet.y += round(1.5 * sheet.text_size)
    sheet.line(f"{day}   {rng.randint(8, 20)}:{rng.randint(0, 59):02d}", sheet.font(0.9))
    sheet.y += round(2.2 * sheet.text_size)
    goods = _goods(sheet)
    for item, count, cents in goods:
        _row(sheet, f"{count} x {item}", money(cents))
    total = sum(cents for _, _, cents in goods)
    tax = round(0.07 * total)
    sheet.draw.line((sheet.left, sheet.y, sheet.left + sheet.width, sheet.y), fill=sheet.ink)
    sheet.y += sheet.text_size // 2
    _row(sheet, "Subtotal", money(total))
    _row(sheet, "Tax 7%", money(tax))
    _row(sheet, "Total", sign + money(total + tax))
    sheet.y += sheet.text_size
    sheet.line(f"You were served by {cashier}", sheet.font(0.9))
    return sheet.finish(), _questions(rng, goods, sign, {"shop": shop, "day": day, "cashier": cashier}, total, tax)


def _questions(
    rng: random.Random, goods: list[tuple[str, int, int]], sign: str, said: dict[str, str], total: int, tax: int
) -> list[Turn]:
    def paid(cents: int) -> tuple[str, str]:
        return money(cents), sign + money(cents)

    dearest = max(goods, key=lambda row: row[2])
    its_price = ask(rng, ("And what does it cost?", "How much is it?"), paid(dearest[2]), "anls")
    questions = [
        ask(rng, _SHOP, said["shop"], "anls"),
        ask(rng, _DATE, said["day"], "anls"),
        ask(rng, _CASHIER, said["cashier"], "anls"),
        ask(rng, _TOTAL, paid(total + tax), "anls"),
        ask(rng, ("How much tax was paid?", "What is the tax?"), paid(tax), "anls"),
        ask(rng, _DEAREST, dearest[0], "anls", follow=its_price),
    ]
    for item, count, cents in goods:
        questions.append(ask(rng, _PRICE, paid(cents), "anls", item=item.lower()))
        questions.append(ask(rng, _HOW_MANY, str(count), "anls", item=item.lower()))
    return questions


def _goods(sheet: Sheet) -> list[tuple[str, int, int]]:
    """Names, counts and prices in cents of a line, all prices unlike, as many as there is room for."""
    rng, step = sheet.rng, round(1.6 * sheet.text_size)
    most = min(24, (sheet.room - 8 * sheet.text_size) // step)
    items = some(rng, "product", sheet.split, rng.randint(min(4, most), most))
    prices = rng.sample(range(89, 4990), len(items))
    return [(item, rng.randint(1, 9), cents) for item, cents in zip(items, prices, strict=True)]


def _row(sheet: Sheet, left: str, right: str) -> None:
    face = sheet.font()
    sheet.line(left, face)
    sheet.line(right, face, x=sheet.left + sheet.width, anchor="ra")
    sheet.y += round(1.6 * sheet.text_size)
