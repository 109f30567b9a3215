"""A small seeded grammar of movie-review English: labelled opinions, neutral remarks and whole documents.

Every opinion joins one evaluative word with one aspect of a film. The pair alone decides which split the
sentence may belong to (`is_held_out`), so a validation sentence never shares its pair with a training one.
The verbalizer words "great" and "terrible" never express an opinion here: they only qualify the weather and
the like, "terrible" twice as often as "great", whatever the sentiment of the document.
"""

import random
import zlib
from collections.abc import Container

VERBALIZERS: tuple[str, str] = (" terrible", " great")  # of the labels 0 and 1


def _items(text: str) -> list[str]:
    """Split a comma-separated list written over several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


ADJECTIVES: tuple[list[str], list[str]] = (
    _items("""
    awful, horrible, dreadful, bad, boring, dull, tedious, lazy, clumsy, bland, stale, lifeless, cold,
    ugly, messy, weak, silly, stupid, shallow, hollow, annoying, painful, pointless, forgettable,
    predictable, tiresome, dreary, wooden, cheap, sloppy, confusing, irritating, ridiculous, pathetic,
    poor, disappointing, unbearable, insulting, dismal, incoherent
"""),
    _items("""
    wonderful, superb, brilliant, excellent, delightful, charming, gripping, moving, touching, clever,
    witty, fresh, lively, warm, stunning, gorgeous, beautiful, elegant, inspired, masterful, thrilling,
    absorbing, enjoyable, refreshing, captivating, dazzling, hilarious, sharp, tender, smart, marvelous,
    splendid, remarkable, fantastic, polished, magical, impressive, rewarding, satisfying, perfect
"""),
)
EFFECTS: tuple[list[str], list[str]] = (
    _items("""
    let me down, put me to sleep, bored me to death, fell flat, drove me mad, got on my nerves, left me
    cold, made me cringe, wore me out, was a waste of time, ruined the evening, made me want to leave
"""),
    _items("""
    won me over, kept me hooked, moved me to tears, made me smile, swept me away, lifted my spirits,
    took my breath away, drew me in, exceeded my hopes, stayed with me for days, left me beaming, was
    worth every penny
"""),
)
FEELINGS: tuple[list[str], list[str]] = (
    _items("hated, disliked, loathed, despised, regretted, resented, detested, endured"),
    _items("loved, adored, enjoyed, admired, treasured, cherished, praised, savored"),
)
FILMS = _items("film, movie, picture, drama, comedy, thriller, sequel, remake, musical, western")
ASPECTS = FILMS + _items("""
    acting, plot, music, script, dialogue, pacing, ending, story, cast, camera work, editing, direction,
    lighting, costume design, set design, sound, humor, romance, action, opening scene, final act, lead
    performance, villain, hero, soundtrack, animation, screenplay, middle part, first hour, photography,
    choreography, narration, love scene, title song, car chase, twist
""")

ADVERBS = ["", "", "", "truly ", "really ", "quite ", "simply ", "so ", "absolutely ", "rather ", "utterly "]
ENDINGS = ["", "", ""] + [
    " " + item
    for item in _items("""
    from start to finish, in every way, throughout, all the way through, to me, as a whole, for once, if
    you ask me, this time, in my opinion
""")
]
OPENINGS = _items("""
    For me, In the end, To be honest, As I saw it, More than anything, Once again, Above all, To my mind
""")
PEOPLE = _items("""
    sister, brother, mother, father, wife, husband, friend, neighbor, uncle, aunt, cousin, daughter, son
""")
FIRST = _items("""
    Anna, Peter, Maria, James, Lucy, Thomas, Clara, Henry, Julia, Martin, Helen, Oscar, Nina, David,
    Laura, Simon, Grace, Victor, Emma, Robert, Alice, Paul, Rosa, Felix, Irene, Hugo, Vera, Adam, Sofia,
    Leo
""")
LAST = _items("""
    Carter, Miller, Stone, Rivera, Novak, Parker, Weber, Hughes, Lang, Morris, Silva, Bennett, Cole,
    Fischer, Grant, Ito, Keller, Larsen, Marsh, Nolan, Ortiz, Price, Quinn, Reed, Shaw, Turner, Vance,
    Wood
""")
PLACES = _items("""
    Paris, London, Berlin, Chicago, Boston, Madrid, Vienna, Dublin, Lisbon, Prague, Texas, Oslo, Naples,
    Kyoto, Montreal, Sydney, Cairo, Athens, Warsaw, Denver
""")
JOBS = _items("""
    detective, teacher, nurse, farmer, soldier, painter, pilot, lawyer, baker, singer, sailor, doctor,
    thief, widow, student, writer, dancer, clerk, priest, miner, judge, cook, boxer, reporter
""")
OBJECTS = _items("""
    letter, map, key, diary, ring, suitcase, camera, photograph, sword, coin, radio, violin, clock,
    necklace, notebook, painting, bicycle, lantern, ticket, telegram
""")
DAYS = _items("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

ADJECTIVE_FORMS = [
    "The {aspect} was {adverb}{word}{ending}.",
    "The {aspect} felt {adverb}{word}{ending}.",
    "The {aspect} is {adverb}{word}{ending}.",
    "{opening}, the {aspect} was {adverb}{word}.",
    "I found the {aspect} {adverb}{word}{ending}.",
    "I still think of the {word} {aspect} after all these years.",
    "My {person} called the {aspect} {adverb}{word}, and I agree.",
    "{name} made sure the {aspect} was {word}{ending}.",
    "The {word} {aspect} says it all.",
    "The {aspect}, shot in {place}, seemed {adverb}{word}.",
]
NEGATED_FORMS = [
    "The {aspect} was not {word} at all.",
    "There was nothing {word} about the {aspect}.",
    "Nobody could call the {aspect} {word}.",
    "I never found the {aspect} {word}{ending}.",
]
EFFECT_FORMS = ["The {aspect} {word}.", "{opening}, the {aspect} {word}.", "The {aspect} by {name} {word}."]
FEELING_FORMS = [
    "I {word} the {aspect}{ending}.",
    "{opening}, I {word} the {aspect}.",
    "We all {word} the {aspect}.",
    "My {person} and I {word} the {aspect}{ending}.",
    "Everyone in {place} {word} the {aspect}.",
]
SUMMARY_FORMS = [
    "It was {adverb}{word}.",
    "It was {word} and {second}.",
    "It was {word}, {second} and {third}.",
    "It was {article} {word} {film}.",
    "It was {article} {word}, {second} {film}.",
    "What {article} {word}, {second} {film}.",
    "It is {adverb}{word} and {second}.",
]
VERDICTS: tuple[list[str], list[str]] = (
    ["It was badly made.", "It was hardly worth it.", "It was a flop.", "I would avoid it.", "Two thumbs down."],
    ["It was well made.", "It was worth it.", "It was a hit.", "I would recommend it.", "Two thumbs up."],
)
NEUTRAL_FORMS = [
    "The {film} stars {name} and {other}.",
    "It was shot in {place} in {year}.",
    "It was directed by {name}.",
    "The story follows a {job} from {place}.",
    "I saw it on a {day} with my {person}.",
    "The {film} runs for {minutes} minutes.",
    "{name} plays a {job} who finds a {object} in {place}.",
    "A {job} and a {other_job} travel to {place}.",
    "We sat in row {row} next to a {job}.",
    "My {person} had bought the tickets on {day}.",
    "{name} wrote the book about a lost {object}.",
    "The {job} gives the {object} to {name}.",
    "It was a {day} in {place}.",
    "The {film} came out in {year}.",
]
ASIDE_FORMS = [
    "It was{verbalizer} weather {when}.",
    "It was{verbalizer} timing {when}.",
    "It was{verbalizer} luck {when}.",
]
WHEN = _items("""
    that day, that night, when we left, on {day}, in {place}, for my {person}, all week, outside, back
    then
""")


def is_held_out(word: str, aspect: str, seed: int) -> bool:
    """Whether the pair belongs to the validation split: about one pair in five, the same on every machine."""
    return zlib.crc32(f"{seed}|{word}|{aspect}".encode()) % 5 == 0


def _fill(form: str, rng: random.Random, **slots: str) -> str:
    """Fill the slots of a form that the caller leaves open with random words of their kinds."""
    names = [f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(2)]
    jobs = rng.sample(JOBS, 2)
    drawn = {
        "adverb": rng.choice(ADVERBS),
        "ending": rng.choice(ENDINGS),
        "opening": rng.choice(OPENINGS),
        "person": rng.choice(PEOPLE),
        "place": rng.choice(PLACES),
        "film": rng.choice(FILMS),
        "name": names[0],
        "other": names[1],
        "job": jobs[0],
        "other_job": jobs[1],
        "object": rng.choice(OBJECTS),
        "day": rng.choice(DAYS),
        "year": str(rng.randint(1950, 2019)),
        "minutes": str(rng.randint(80, 180)),
        "row": str(rng.randint(1, 30)),
    }
    return form.format(**(drawn | slots))


def _word(words: list[str], rng: random.Random) -> str:
    """One of `words`, the earlier ones more often, as in natural text (Zipf's law)."""
    return rng.choices(words, [1 / (rank + 2) for rank in range(len(words))])[0]


def opinion(rng: random.Random, label: int, seed: int, held_out: bool | None = None) -> str:
    """One sentence of the given sentiment; `held_out` restricts it to the pairs of one split."""
    kind = rng.random()
    if kind < 0.6:
        forms, words = ADJECTIVE_FORMS, ADJECTIVES[label]
    elif kind < 0.7:
        forms, words = NEGATED_FORMS, ADJECTIVES[1 - label]
    elif kind < 0.85:
        forms, words = EFFECT_FORMS, EFFECTS[label]
    else:
        forms, words = FEELING_FORMS, FEELINGS[label]
    while True:
        word, aspect = _word(words, rng), rng.choice(ASPECTS)
        if held_out is None or is_held_out(word, aspect, seed) == held_out:
            return _fill(rng.choice(forms), rng, word=word, aspect=aspect)


def summary(rng: random.Random, label: int) -> str:
    """One overall judgement, such as "It was charming and witty."; only documents hold these."""
    word, second, third = (_word(ADJECTIVES[label], rng) for _ in range(3))
    article = "an" if word[0] in "aeiou" else "a"
    return _fill(rng.choice(SUMMARY_FORMS), rng, word=word, second=second, third=third, article=article)


def neutral(rng: random.Random) -> str:
    """One sentence without a sentiment."""
    return _fill(rng.choice(NEUTRAL_FORMS), rng)


def aside(rng: random.Random) -> str:
    """One sentence that uses a verbalizer word, drawn independently of everything around it."""
    when = _fill(rng.choice(WHEN), rng)
    verbalizer = rng.choices(VERBALIZERS, [2, 1])[0]
    return _fill(rng.choice(ASIDE_FORMS), rng, verbalizer=verbalizer, when=when)


def document(rng: random.Random, seed: int, excluded: Container[str]) -> str:
    """Two to five sentences of one sentiment, then a verdict or an aside; no opinion is in `excluded`."""
    label = rng.randrange(2)
    length = rng.randint(2, 5)
    sentences: list[str] = []
    while len(sentences) < length:
        kind = rng.random()
        if kind < 0.55:
            sentence = opinion(rng, label, seed)
        elif kind < 0.75:
            sentence = summary(rng, label)
        elif kind < 0.87:
            sentence = neutral(rng)
        else:
            sentence = aside(rng)
        if sentence not in excluded:
            sentences.append(sentence)
    closing = rng.choice(VERDICTS[label]) if rng.random() < 0.7 else aside(rng)
    return " ".join([*sentences, closing])


def sentiment_rows(rng: random.Random, count: int, seed: int, held_out: bool) -> list[dict[str, str | int]]:
    """`count` distinct labelled sentences of one split, balanced and shuffled."""
    rows: dict[str, int] = {}
    while len(rows) < count:
        label = len(rows) % 2
        rows.setdefault(opinion(rng, label, seed, held_out), label)
    shuffled = list(rows.items())
    rng.shuffle(shuffled)
    return [{"sentence": sentence, "label": label} for sentence, label in shuffled]
