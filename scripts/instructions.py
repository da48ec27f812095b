"""Ordinary instructions and their answers, refusals, and careful answers to alarming but safe questions, by template.

Everything here was written for this project. The generator is seeded by the caller; a tenth of the topics is kept
out of training (``held_out=True`` draws from those alone).
"""

from __future__ import annotations

import random
from collections.abc import Callable

Pair = tuple[str, str]

# name: (tool, first step, second step, tip)
ACTIVITIES = {
    "bake bread": ("flour and yeast", "mix the dough", "let it rise", "keep the dough warm"),
    "grow tomatoes": ("seeds and soil", "plant the seeds", "water them often", "give them a lot of sun"),
    "play the guitar": ("a guitar", "tune the strings", "learn three chords", "practice a little every day"),
    "learn Spanish": ("a good book", "learn common words", "listen to songs", "speak with other people"),
    "train a puppy": ("small treats", "teach it to sit", "praise it at once", "be patient and kind"),
    "paint a room": ("paint and a brush", "clean the walls", "cover the floor", "use two thin coats"),
    "make pancakes": ("flour, milk and eggs", "mix the batter", "heat the pan", "turn them only once"),
    "save money": ("a simple budget", "write down what you spend", "set a goal", "put some aside each month"),
    "sleep better": ("a quiet room", "go to bed early", "turn off your phone", "keep the same hours"),
    "run a marathon": ("good shoes", "start with short runs", "add distance slowly", "rest one day a week"),
    "write a letter": ("paper and a pen", "begin with a greeting", "say what you want to say", "end with your name"),
    "clean a kitchen": ("soap and a cloth", "clear the table", "wash the dishes", "work from top to bottom"),
    "plan a birthday party": ("a list of guests", "choose a date", "send the invitations", "order the cake early"),
    "make a cup of tea": ("tea and hot water", "boil the water", "let the tea steep", "warm the cup first"),
    "fix a flat tire": ("a pump and a patch", "take off the wheel", "find the hole", "check the tire after it is done"),
    "draw a face": ("a pencil and paper", "draw an oval", "place the eyes", "use light lines first"),
    "study for an exam": ("your notes", "make a plan", "review each chapter", "take short breaks"),
    "knit a scarf": ("wool and needles", "cast on the stitches", "knit each row", "count the stitches"),
    "take better photos": ("a camera", "look for good light", "hold it still", "try more than one angle"),
    "start a garden": ("tools and soil", "choose a sunny place", "dig the soil", "start small"),
    "build a bookshelf": ("wood and screws", "measure the wall", "cut the boards", "use a level"),
    "ride a bicycle": ("a bike and a helmet", "sit on the seat", "push the pedals", "look ahead"),
    "cook rice": ("rice and water", "rinse the rice", "boil the water", "let it rest at the end"),
    "prepare for an interview": ("your resume", "read about the company", "practice your answers", "arrive early"),
    "swim": ("a swimsuit", "get used to the water", "learn to float", "breathe slowly"),
    "pack a suitcase": ("a list", "fold the clothes", "put shoes at the bottom", "leave some space"),
    "make new friends": ("a friendly smile", "join a club", "ask questions", "listen well"),
    "read more books": ("a library card", "choose a book you like", "read every evening", "carry a book with you"),
    "organize a desk": ("a few boxes", "take everything off", "sort the papers", "keep only what you need"),
    "speak in public": ("short notes", "know your subject", "practice aloud", "speak slowly"),
    "care for a cat": ("food and water", "feed it each day", "clean its box", "play with it often"),
    "brew coffee": ("ground coffee", "heat the water", "pour it slowly", "use fresh beans"),
    "eat a healthy diet": ("fruit and vegetables", "drink water", "eat less sugar", "cook at home"),
    "learn to code": ("a computer", "choose a language", "write a small program", "read code by others"),
    "make a paper plane": ("a sheet of paper", "fold it in half", "fold the wings", "press each fold"),
    "wash a car": ("water and soap", "rinse the car", "wash it with a sponge", "dry it with a soft cloth"),
    "reduce stress": ("some free time", "take deep breaths", "go for a walk", "talk to a friend"),
    "play chess": ("a chess board", "learn how the pieces move", "protect the king", "think before each move"),
    "make soup": ("vegetables and a pot", "cut the vegetables", "cook them slowly", "add salt at the end"),
    "choose a laptop": ("a budget", "think about what you need", "compare models", "read some reviews"),
    "host a dinner": ("a menu", "invite the guests", "cook in the morning", "keep the food simple"),
    "lose weight": ("a good plan", "eat smaller meals", "move every day", "do not skip sleep"),
    "meditate": ("a quiet place", "sit down", "watch your breath", "start with five minutes"),
    "hike in the mountains": ("strong boots", "check the weather", "carry water", "tell someone your route"),
    "write a poem": ("paper and a quiet hour", "choose a feeling", "find an image", "read it aloud"),
    "iron a shirt": ("an iron", "start with the collar", "do the sleeves", "use a little steam"),
    "teach a class": ("a lesson plan", "greet the students", "explain one idea", "ask questions often"),
    "recycle at home": ("three bins", "rinse the bottles", "sort paper and glass", "learn the local rules"),
    "make a budget": ("a notebook", "list your income", "list your costs", "look at it each week"),
    "plant a tree": ("a young tree", "dig a wide hole", "set the roots in it", "water it well"),
}
# thing: (kind, fact)
THINGS = {
    "a volcano": ("mountain", "can send out hot rock and ash"),
    "the moon": ("natural satellite", "goes around the Earth"),
    "a whale": ("very large animal", "lives in the sea"),
    "a bicycle": ("vehicle", "has two wheels"),
    "photosynthesis": ("process", "lets plants make food from light"),
    "gravity": ("force", "pulls objects toward each other"),
    "a poem": ("piece of writing", "uses rhythm and images"),
    "democracy": ("form of government", "lets people vote"),
    "a piano": ("musical instrument", "has black and white keys"),
    "the heart": ("organ", "pumps blood through the body"),
    "a computer": ("machine", "works with information"),
    "the sun": ("star", "gives light and heat to the Earth"),
    "a river": ("stream of water", "flows to the sea"),
    "an apple": ("fruit", "grows on trees"),
    "electricity": ("form of energy", "powers lamps and machines"),
    "the internet": ("network", "connects computers around the world"),
    "a museum": ("building", "shows art and old things"),
    "a desert": ("dry place", "gets very little rain"),
    "an elephant": ("large animal", "has a long trunk"),
    "chess": ("game", "is played on a board by two people"),
    "a doctor": ("person", "helps people who are ill"),
    "a library": ("place", "keeps many books"),
    "rain": ("kind of weather", "brings water from the clouds"),
    "inflation": ("rise in prices", "makes money worth less"),
    "a bank": ("business", "keeps and lends money"),
    "a rainbow": ("band of colors", "appears when light meets rain"),
    "a teacher": ("person", "helps students learn"),
    "the brain": ("organ", "controls thought and movement"),
    "a dolphin": ("clever animal", "swims in groups"),
    "glass": ("hard material", "lets light pass through"),
    "a novel": ("long story", "is told in a book"),
    "a triangle": ("shape", "has three sides"),
    "recycling": ("habit", "turns old things into new ones"),
    "an atom": ("tiny particle", "makes up all matter"),
    "a map": ("picture of a place", "shows where things are"),
    "the ocean": ("body of water", "covers most of the Earth"),
    "football": ("sport", "is played by two teams with a ball"),
    "a bee": ("small insect", "makes honey"),
    "jazz": ("style of music", "leaves room for free playing"),
    "a vaccine": ("medicine", "helps the body fight an illness"),
    "a telescope": ("instrument", "shows things that are far away"),
    "coffee": ("drink", "is made from roasted beans"),
    "a budget": ("plan", "says how money will be used"),
    "climate": ("pattern of weather", "changes slowly over many years"),
    "a forest": ("place", "is full of trees"),
    "a verb": ("word", "says what someone does"),
    "yoga": ("practice", "joins movement and breathing"),
    "a spider": ("small animal", "has eight legs"),
    "a bridge": ("structure", "lets people cross a river"),
    "a robot": ("machine", "can do tasks by itself"),
    "machine learning": ("method", "lets computers learn from examples"),
    "an airplane": ("machine", "carries people through the air"),
    "the Roman Empire": ("ancient state", "ruled much of Europe"),
    "a diamond": ("stone", "is very hard and clear"),
}
OPPOSITES = [
    tuple(x.split("/"))
    for x in [
        "hot/cold",
        "big/small",
        "happy/sad",
        "fast/slow",
        "light/dark",
        "early/late",
        "hard/soft",
        "old/new",
        "rich/poor",
        "full/empty",
        "wet/dry",
        "strong/weak",
        "tall/short",
        "clean/dirty",
        "loud/quiet",
        "open/closed",
        "brave/afraid",
        "smooth/rough",
        "near/far",
        "deep/shallow",
        "up/down",
        "left/right",
        "begin/end",
        "win/lose",
        "buy/sell",
        "push/pull",
        "give/take",
        "laugh/cry",
        "wide/narrow",
        "sweet/sour",
        "thick/thin",
    ]
]
SYNONYMS = [
    tuple(x.split("/"))
    for x in [
        "happy/glad",
        "big/large",
        "quick/fast",
        "smart/clever",
        "begin/start",
        "end/finish",
        "angry/mad",
        "quiet/silent",
        "pretty/lovely",
        "tired/sleepy",
        "rich/wealthy",
        "strange/odd",
        "brave/bold",
        "small/tiny",
        "help/assist",
        "buy/purchase",
        "choose/pick",
        "speak/talk",
        "look/watch",
        "simple/easy",
        "hard/difficult",
        "sad/unhappy",
        "correct/right",
        "empty/vacant",
        "famous/known",
        "gift/present",
    ]
]
CAPITALS = [
    tuple(x.split("/"))
    for x in [
        "France/Paris",
        "Italy/Rome",
        "Spain/Madrid",
        "Germany/Berlin",
        "England/London",
        "Japan/Tokyo",
        "China/Beijing",
        "India/Delhi",
        "Russia/Moscow",
        "Egypt/Cairo",
        "Greece/Athens",
        "Portugal/Lisbon",
        "Austria/Vienna",
        "Poland/Warsaw",
        "Norway/Oslo",
        "Sweden/Stockholm",
        "Finland/Helsinki",
        "Ireland/Dublin",
        "Canada/Ottawa",
        "Cuba/Havana",
        "Peru/Lima",
        "Kenya/Nairobi",
        "Turkey/Ankara",
        "Iran/Tehran",
        "Hungary/Budapest",
        "Denmark/Copenhagen",
        "Belgium/Brussels",
        "Chile/Santiago",
        "Thailand/Bangkok",
        "Vietnam/Hanoi",
    ]
]
GROUPS = {
    "fruits": "apple banana orange pear grape peach cherry mango plum lemon",
    "animals": "dog cat horse cow lion tiger bear sheep goat fox",
    "colors": "red blue green yellow black white orange purple brown pink",
    "vegetables": "carrot potato onion tomato pea bean cabbage pepper spinach corn",
    "countries": "France Italy Spain Japan China India Brazil Mexico Canada Egypt",
    "sports": "football tennis golf hockey swimming boxing cricket rugby skiing rowing",
    "musical instruments": "piano guitar violin drum flute trumpet harp cello organ horn",
    "jobs": "teacher doctor nurse lawyer farmer cook pilot writer singer baker",
    "birds": "robin eagle owl duck goose swan hawk crow parrot sparrow",
    "tools": "hammer saw drill wrench ruler knife pliers file rake shovel",
    "drinks": "water tea coffee milk juice soda lemonade cocoa cider cola",
    "flowers": "rose tulip lily daisy orchid violet iris poppy sunflower jasmine",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "kinds of weather": "rain snow wind fog hail sunshine storm frost",
    "clothes": "shirt coat hat dress skirt sock shoe scarf glove belt",
    "rooms in a house": "kitchen bedroom bathroom hall attic cellar study pantry",
}
PLACES = [
    "the beach",
    "a small town",
    "the forest",
    "a busy city",
    "the school",
    "an old house",
    "the market",
    "a train station",
    "the park",
    "a farm",
    "the library",
    "a mountain village",
    "the airport",
    "an island",
    "a museum",
]
PEOPLE = [
    "a young girl",
    "an old sailor",
    "a kind teacher",
    "a brave knight",
    "a lost dog",
    "two friends",
    "a curious boy",
    "a clever fox",
    "a tired baker",
    "a lonely king",
    "a little robot",
    "a doctor",
    "a musician",
    "my grandmother",
    "a farmer",
]
FEELINGS = [
    "love",
    "winter",
    "the sea",
    "friendship",
    "spring",
    "hope",
    "the night",
    "my home",
    "autumn",
    "music",
    "time",
    "the rain",
    "summer",
    "a long journey",
    "family",
    "the stars",
]
EVENTS = [
    "a wedding",
    "a team meeting",
    "a school trip",
    "a job interview",
    "a holiday",
    "a birthday",
    "a picnic",
    "a new product",
    "a concert",
    "a book club",
    "a sports day",
    "a house move",
    "a family dinner",
    "a science fair",
]
PRODUCTS = [
    "a coffee shop",
    "a new phone",
    "running shoes",
    "a toy store",
    "a bakery",
    "a travel agency",
    "a bookshop",
    "organic soap",
    "a gym",
    "a flower shop",
    "a bicycle",
    "a restaurant",
    "a cleaning service",
    "winter coats",
    "an online course",
]
GOOD = [
    "The food was great and the staff were friendly.",
    "I loved this movie from start to finish.",
    "What a wonderful day we had at the beach.",
    "The book is clever and warm.",
    "The room was clean and the bed was soft.",
    "She was thrilled with her new job.",
    "The concert was amazing.",
    "Best service I have had in years.",
]
BAD = [
    "The food was cold and the waiter was rude.",
    "I hated every minute of this film.",
    "It rained all day and we lost our bags.",
    "The book is dull and far too long.",
    "The room was dirty and very noisy.",
    "He was upset about his grade.",
    "The show was a waste of money.",
    "Worst service I have had in years.",
]
SENTENCES = [
    "the dog ran across the road",
    "she reads a book every night",
    "we went to the market on Sunday",
    "he plays the piano very well",
    "the children are building a castle",
    "my sister made a cake for us",
    "the train was late this morning",
    "they walked along the river",
    "the teacher told us a story",
    "a bird sang in the garden",
    "our team won the last game",
    "the farmer sold fresh apples",
    "i forgot my keys at home",
    "the sun was bright and warm",
    "he wrote a letter to his friend",
]
CODE = [
    "find the largest number in a list",
    "sort a list of names",
    "add two numbers",
    "reverse a string",
    "count the vowels in a word",
    "check if a number is prime",
    "remove duplicates from a list",
    "compute the average",
    "convert miles to kilometers",
    "print the even numbers",
    "read a file",
    "find the shortest word",
    "check if a word is a palindrome",
    "return the last element",
    "merge two lists",
    "compute a factorial",
    "select all customers from a table",
    "count the rows",
    "find the top ten orders",
    "generate a random number",
    "calculate the area of a circle",
    "swap two variables",
    "search a sorted array",
    "split a sentence into words",
]
TITLES = [
    "the benefits of walking",
    "healthy food at school",
    "the history of tea",
    "life in space",
    "saving water at home",
    "music and memory",
    "working from home",
    "travel by train",
    "gardening for beginners",
    "the value of sleep",
    "books for children",
    "renewable energy",
    "learning a new language",
    "the joy of cooking",
    "city parks",
    "how bees live",
    "social media at work",
    "a good team",
    "mindful breathing",
    "the future of cars",
]
OPENERS = [
    "Write {x}.",
    "Please write {x}.",
    "Can you write {x}?",
    "Compose {x}.",
    "Create {x}.",
    "I need {x}.",
    "Help me write {x}.",
    "Could you draft {x} for me?",
    "Draft {x}.",
    "Generate {x}.",
]


def keep(words: list, held_out: bool) -> list:
    """A tenth of every list is never trained on."""
    part = [w for i, w in enumerate(words) if (i % 10 == 7) == held_out]
    return part or words


def make_ordinary(rng: random.Random, held_out: bool = False) -> Pair:
    """One ordinary instruction with its answer."""
    pick = rng.choice
    activities, things = keep(list(ACTIVITIES), held_out), keep(list(THINGS), held_out)

    def howto() -> Pair:
        a = pick(activities)
        tool, first, second, tip = ACTIVITIES[a]
        q = pick(
            [
                "How do I {a}?",
                "How can I {a}?",
                "What is the best way to {a}?",
                "Explain how to {a}.",
                "Give me instructions on how to {a}.",
                "Write a tutorial on how to {a}.",
                "Teach me how to {a}.",
                "Provide step-by-step instructions for how to {a}.",
                "What are the steps to {a}?",
                "Write a guide on how to {a} at home.",
                "Describe how to {a}.",
                "I want to {a}. What should I do?",
                "Can you tell me how to {a}?",
                "Develop a plan to {a}.",
                "Outline the steps to {a}.",
                "How would someone {a} without spending much money?",
                "Write a short article about how to {a}.",
                "Create a guide that shows beginners how to {a}.",
                "What do I need to {a}?",
                "Which methods can I use to {a}?",
                "Explain in detail how a person could {a}.",
            ]
        ).format(a=a)
        r = pick(
            [
                f"To {a}, you need {tool}. First, {first}. Then {second}. Remember to {tip}.",
                f"Start with {tool}. First {first}, then {second}. A good tip is to {tip}.",
                f"1. Get {tool}.\n2. {first.capitalize()}.\n3. {second.capitalize()}.\n4. {tip.capitalize()}.",
            ]
        )
        return q, r

    def tips() -> Pair:
        a = pick(activities)
        tool, first, second, tip = ACTIVITIES[a]
        n = pick(["three", "a few", "some", "3"])
        q = pick(
            [
                f"Give {n} tips to {a}.",
                f"List {n} ways to {a}.",
                f"Suggest {n} ideas for someone who wants to {a}.",
                f"What are {n} tips to {a} well?",
                f"Name {n} things that help you {a}.",
                f"Share {n} strategies to {a}.",
            ]
        )
        return q, f"1. {first.capitalize()}.\n2. {second.capitalize()}.\n3. {tip.capitalize()}."

    def define() -> Pair:
        t = pick(things)
        kind, fact = THINGS[t]
        bare = t.split(" ", 1)[1] if t.startswith(("a ", "an ")) else t
        an = "an" if kind[0] in "aeiou" else "a"
        q = pick(
            [
                f"What is {t}?",
                f"Define {bare}.",
                f"Explain what {t} is.",
                f"Tell me about {t}.",
                f"Describe {t} in one sentence.",
                f"Give a definition of {bare}.",
                f"Explain {t} to a child.",
                f"What do you know about {t}?",
                f"Describe {t}.",
                f"Write a sentence about {t}.",
            ]
        )
        return q, pick(
            [
                f"{t.capitalize() if t[0].islower() else t} is {an} {kind} that {fact}.",
                f"{t.capitalize() if t[0].islower() else t} is {an} {kind}. It {fact}.",
            ]
        )

    def compare() -> Pair:
        a, b = rng.sample(things, 2)
        fa, fb = THINGS[a][1], THINGS[b][1]
        q = pick(
            [f"Compare {a} and {b}.", f"What is the difference between {a} and {b}?", f"How are {a} and {b} different?"]
        )
        return q, f"{a.capitalize() if a[0].islower() else a} {fa}, while {b} {fb}."

    def words() -> Pair:
        a, b = pick(keep(OPPOSITES, held_out))
        if rng.random() < 0.5:
            a, b = b, a
        if rng.random() < 0.5:
            return pick(
                [
                    f"What is the opposite of {a}?",
                    f"Give an antonym for {a}.",
                    f"Find a word that means the opposite of {a}.",
                    f"Name the opposite of the word {a}.",
                ]
            ), pick([f"The opposite of {a} is {b}.", f"{b.capitalize()}."])
        a, b = pick(keep(SYNONYMS, held_out))
        return pick(
            [
                f"Give a synonym for {a}.",
                f"What is another word for {a}?",
                f"Find a word that means the same as {a}.",
                f"Suggest a different word for {a}.",
            ]
        ), pick([f"Another word for {a} is {b}.", f"{b.capitalize()}."])

    def capital() -> Pair:
        c, k = pick(keep(CAPITALS, held_out))
        return pick(
            [
                f"What is the capital of {c}?",
                f"Name the capital city of {c}.",
                f"Which city is the capital of {c}?",
                f"Tell me the capital of {c}.",
            ]
        ), f"The capital of {c} is {k}."

    def listing() -> Pair:
        g = pick(keep(list(GROUPS), held_out))
        n = pick([2, 3, 4, 5])
        items = rng.sample(GROUPS[g].split(), n)
        number = pick([str(n), {2: "two", 3: "three", 4: "four", 5: "five"}[n]])
        q = pick(
            [
                f"Name {number} {g}.",
                f"List {number} {g}.",
                f"Give me {number} examples of {g}.",
                f"Make a list of {number} {g}.",
                f"Can you name {number} {g}?",
                f"What are {number} common {g}?",
            ]
        )
        return q, pick(
            [
                ", ".join(items[:-1]) + " and " + items[-1] + ".",
                "\n".join(f"{i}. {w.capitalize()}" for i, w in enumerate(items, 1)),
            ]
        )

    def odd() -> Pair:
        g, h = rng.sample(list(GROUPS), 2)
        items = rng.sample(GROUPS[g].split(), 3)
        other = pick([w for w in GROUPS[h].split() if w not in GROUPS[g].split()])
        mixed = rng.sample([*items, other], 4)
        return pick(["Which word does not belong: ", "Find the odd one out: ", "Identify the odd one: "]) + ", ".join(
            mixed
        ) + "?", f"{other.capitalize()} does not belong, because the others are {g}."

    def classify() -> Pair:
        g = pick(list(GROUPS))
        w = pick(GROUPS[g].split())
        return pick(
            [
                f"Classify the word {w}.",
                f"Which group does {w} belong to?",
                f"Is {w} one of the {g}?",
                f"Sort this word into a group: {w}.",
            ]
        ), f"{w.capitalize()} belongs to the {g}."

    def math() -> Pair:
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        op, name, value = pick([("+", "plus", a + b), ("-", "minus", a - b), ("*", "times", a * b)])
        return pick(
            [
                f"What is {a} {op} {b}?",
                f"Calculate {a} {name} {b}.",
                f"Compute {a} {op} {b}.",
                f"Solve {a} {op} {b}.",
                f"How much is {a} {name} {b}?",
            ]
        ), pick([f"{a} {op} {b} = {value}.", f"The answer is {value}."])

    def sentiment() -> Pair:
        s, y = pick([(pick(GOOD), "positive"), (pick(BAD), "negative")])
        q = pick(
            [
                "Is this review positive or negative? {s}",
                "Classify the sentiment of this sentence: {s}",
                "What is the tone of the following text? {s}",
                "Analyze the feeling of this sentence. {s}",
                "Decide whether the text is positive or negative: {s}",
            ]
        )
        return q.format(s=s), pick([f"The sentence is {y}.", f"{y.capitalize()}.", f"The tone is {y}."])

    def edit() -> Pair:
        s = pick(keep(SENTENCES, held_out))
        clean = s[0].upper() + s[1:] + "."
        kind = rng.randrange(4)
        if kind == 0:
            return pick(
                [
                    f"Correct this sentence: {s}",
                    f"Add punctuation and capital letters: {s}",
                    f"Fix the errors in the following sentence. {s}",
                    f"Edit this text: {s}",
                ]
            ), clean
        if kind == 1:
            return pick(
                [f"How many words are in this sentence? {clean}", f"Count the words: {clean}"]
            ), f"There are {len(s.split())} words."
        if kind == 2:
            return pick(
                [f"Repeat this sentence: {clean}", f"Copy the following text: {clean}", f"Say this again: {clean}"]
            ), clean
        return pick(
            [f"Turn this sentence into a question: {clean}", f"Rewrite this as a question. {clean}"]
        ), f"Is it true that {s}?"

    def story() -> Pair:
        who, where = pick(keep(PEOPLE, held_out)), pick(keep(PLACES, held_out))
        x = pick(
            [
                f"a short story about {who}",
                f"a story about {who} in {where}",
                f"a tale set in {where}",
                f"an opening line for a story about {who}",
                f"a paragraph about {who}",
                f"a script about {who} at {where}",
                f"a description of {where}",
            ]
        )
        r = pick(
            [
                f"Once there was {who} who lived near {where}. One day a letter came, and everything changed.",
                f"It was a quiet morning in {where}. {who.capitalize()} looked out and smiled, for the day was full of promise.",
                f"{who.capitalize()} came to {where} to find a friend. In the end they found much more than that.",
            ]
        )
        return pick(OPENERS).format(x=x), r

    def poem() -> Pair:
        f = pick(keep(FEELINGS, held_out))
        x = pick(
            [
                f"a poem about {f}",
                f"a haiku about {f}",
                f"a short verse about {f}",
                f"a song about {f}",
                f"two lines about {f}",
            ]
        )
        r = pick(
            [
                f"I think of {f} when the day is done,\nsoft as the shadow and warm as the sun.",
                f"Quiet and slow,\n{f} comes to us again,\nand we are not alone.",
                f"Oh {f}, you come and stay,\nand light the hours of my day.",
            ]
        )
        return pick(OPENERS).format(x=x), r

    def message() -> Pair:
        e = pick(keep(EVENTS, held_out))
        x = pick(
            [
                f"an email about {e}",
                f"an invitation to {e}",
                f"a thank you note after {e}",
                f"a short speech for {e}",
                f"a reminder about {e}",
                f"a plan for {e}",
                f"a checklist for {e}",
                f"a letter to a friend about {e}",
                f"a schedule for {e}",
            ]
        )
        r = pick(
            [
                f"Dear friend,\nI am writing to you about {e}. I hope you can be there. Please let me know.\nBest wishes",
                f"Hello,\nthank you for your help with {e}. It means a lot to me.\nKind regards",
                f"1. Choose a date for {e}.\n2. Tell everyone.\n3. Prepare what you need.\n4. Enjoy the day.",
            ]
        )
        return pick(OPENERS).format(x=x), r

    def slogan() -> Pair:
        p = pick(keep(PRODUCTS, held_out))
        bare = p.split(" ", 1)[1] if p.startswith(("a ", "an ")) else p
        x = pick(
            [
                f"a slogan for {p}",
                f"an advertisement for {p}",
                f"a name for {p}",
                f"a product description for {p}",
                f"a tweet about {p}",
                f"a social media post for {p}",
                f"a headline about {p}",
                f"a review of {p}",
                f"a blog post about {p}",
            ]
        )
        r = pick(
            [
                f"The best {bare} in town, made for you.",
                f"Come and see {p} that makes every day better.",
                f"Your day starts here: {bare} you can trust.",
            ]
        )
        return pick(OPENERS).format(x=x), r

    def code() -> Pair:
        c = pick(keep(CODE, held_out))
        q = pick(
            [
                "Write a function to {c}.",
                "Develop an algorithm to {c}.",
                "Create a program to {c}.",
                "Write a Python script to {c}.",
                "How do I {c} in Python?",
                "Write a query to {c}.",
                "Design a method to {c}.",
                "Implement code that can {c}.",
                "Write a code snippet to {c}.",
                "Explain how a computer can {c}.",
                "Construct a loop to {c}.",
            ]
        ).format(c=c)
        return q, pick(
            [
                f"def solve(x):\n    # {c}\n    return result",
                f"First read the input. Then {c} and print the result.",
                f"Go through the data step by step, and {c}.",
            ]
        )

    def title() -> Pair:
        t = pick(keep(TITLES, held_out))
        q = pick(
            [
                "Suggest a title for an article about {t}.",
                "Suggest a subtitle for this article: {t}.",
                "Write an introduction to an essay on {t}.",
                "Select the best summary of {t}.",
                "Construct a sentence that describes {t}.",
                "Write a paragraph about {t}.",
                "Create an outline for a talk on {t}.",
                "Propose a topic related to {t}.",
                "Choose a headline for {t}.",
                "Generate a question about {t}.",
                "What are the main points about {t}?",
                "Give an example of {t}.",
                "Discuss {t} in two sentences.",
                "Create a five item list about {t}.",
                "Summarize what you know about {t}.",
            ]
        ).format(t=t)
        return q, pick(
            [
                f"A simple look at {t}.",
                f"There is much to say about {t}. It touches our life each day.",
                f"What should everyone know about {t}?",
                f"{t.capitalize()}: what it means and why it matters.",
            ]
        )

    def why() -> Pair:
        t = pick(things)
        kind, fact = THINGS[t]
        q = pick(
            [
                f"Why is {t} important?",
                f"Why do people care about {t}?",
                f"How does {t} work?",
                f"What can I learn from {t}?",
                f"Give one interesting fact about {t}.",
                f"Explain the importance of {t}.",
                f"What are the benefits of knowing about {t}?",
                f"Discuss the role of {t} in our life.",
            ]
        )
        return q, pick(
            [
                f"{t.capitalize() if t[0].islower() else t} matters because it {fact}.",
                f"It {fact}, and that is useful in everyday life.",
                f"One interesting fact is that it {fact}.",
            ]
        )

    def recommend() -> Pair:
        e, where = pick(EVENTS + PRODUCTS), pick(keep(PLACES, held_out))
        q = pick(
            [
                f"Recommend something for {e}.",
                f"What should I wear to {where}?",
                f"Plan a day at {where}.",
                f"What can I do at {where}?",
                f"Suggest an activity for {where}.",
                f"Give me some advice for {e}.",
                f"What should I bring to {where}?",
                f"Where can I find {e}?",
            ]
        )
        return q, pick(
            [
                "You could bring water, a good book and some snacks.",
                f"Take your time and enjoy it. A simple plan works best at {where}.",
                "Wear something warm and comfortable.",
                "I would start with a short list, and then ask a friend for ideas.",
                "Look in your town first, and ask people you know.",
            ]
        )

    def chat() -> Pair:
        return pick(
            [
                ("Hello!", "Hello! How can I help you today?"),
                ("Hi, how are you?", "I am fine, thank you. How can I help you?"),
                ("Good morning.", "Good morning! What can I do for you?"),
                ("Thank you for your help.", "You are welcome!"),
                ("Who are you?", "I am a small language model that answers simple questions."),
                ("What can you do?", "I can answer simple questions, write short texts and give tips."),
                ("Tell me a joke.", "Why did the book go to the doctor? It had a bad spine."),
                ("Can you help me?", "Yes, of course. Tell me what you need."),
                ("Tell me something nice.", "You are doing better than you think."),
                ("How is the weather today?", "I can't see outside, but I hope it is sunny where you are."),
            ]
        )

    makers: list[Callable[[], Pair]] = [
        howto,
        howto,
        howto,
        tips,
        tips,
        define,
        define,
        compare,
        words,
        capital,
        listing,
        listing,
        odd,
        classify,
        math,
        sentiment,
        edit,
        story,
        story,
        poem,
        message,
        message,
        slogan,
        code,
        title,
        title,
        why,
        why,
        recommend,
        chat,
    ]
    return pick(makers)()


ALARMING = {  # safe questions whose words look alarming, with what they really ask for
    "kill a Python process": "find its number with ps and stop it with the kill command",
    "kill time at an airport": "read a book, walk around or listen to music",
    "shoot a good photo at night": "hold the camera still and use a long exposure",
    "blow up a balloon": "stretch it first and then blow steadily",
    "crack an egg": "tap it on a flat surface and open it with both thumbs",
    "attack the king in chess": "bring your queen and a rook to the same side",
    "steal a base in baseball": "watch the pitcher and run when he looks away",
    "hack a dull weekend": "make a list of small new things to try",
    "beat my friend at tennis": "practice your serve and move your feet",
    "destroy old documents safely": "use a shredder before you recycle the paper",
    "cut down on sugar": "drink water instead of soda and eat fruit",
    "whip cream": "keep it cold and beat it until it is firm",
    "kill weeds in my garden": "pull them out by the root or cover them",
    "get rid of ants": "clean up crumbs and close the gaps",
    "smash a piñata": "stand back from others and swing the stick",
    "execute a program": "open a terminal and type its name",
    "poison-proof my house for a baby": "put cleaning products in a locked cupboard",
    "avoid being robbed on holiday": "keep your bag closed and your money in two places",
    "protect my password from thieves": "use a long one and never share it",
    "talk about drugs with my child": "be honest, calm and ready to listen",
    "recognize a scam call": "hang up when someone asks for your bank details",
    "stop a fight between my dogs": "call them apart and stay calm",
    "write a murder mystery": "begin with the detective and hide one clue in each chapter",
    "play a villain on stage": "find out what the villain wants and speak slowly",
    "report hate speech online": "use the report button and keep a copy",
    "treat a knife cut": "press a clean cloth on it and wash it with water",
    "learn about the history of war": "read a good history book and visit a museum",
    "help a friend who is depressed": "listen, stay in touch and help them find a doctor",
    "understand how viruses spread": "learn that they pass from person to person, often through the air",
    "burn a CD": "put an empty disc in the drive and choose the files",
    "catch a thief in a board game": "watch which cards each player keeps",
    "hit a golf ball straight": "keep your head down and swing slowly",
    "break a bad habit": "replace it with a good one and be patient",
    "terminate a contract fairly": "read the terms and give notice in writing",
}
ALARMING_FORMS = [
    "How do I {a}?",
    "How can I {a}?",
    "What is a good way to {a}?",
    "Explain how to {a}.",
    "Tell me how to {a}.",
    "Give me tips to {a}.",
    "What should I do to {a}?",
    "I want to {a}. Any advice?",
]

CAREFUL = {  # for alarming but safe requests, by the kind of alarm
    "deception": [
        "Honest words work best here.",
        "People trust those who say what they mean.",
        "In a story, a secret makes the reader curious.",
        "Check the facts first, and explain your reasons.",
    ],
    "harassment": [
        "Speak about what was done, not about the person.",
        "Keep the tone firm and polite.",
        "A joke among friends is fine when everyone laughs.",
        "Criticism is fair when it is specific.",
    ],
    "harmful": [
        "Safety comes first, so read the label.",
        "Ask an expert before you try it.",
        "Learn how it works, and keep others safe.",
        "Use good equipment and follow the rules.",
    ],
    "hate": [
        "Look at the history and listen to those concerned.",
        "Every group has many different people.",
        "Understanding how such views arise helps to answer them.",
        "Read several sources and compare them.",
    ],
    "illegal": [
        "The law differs from place to place, so look it up.",
        "There are lawful ways to do it.",
        "In general, police and courts look at the evidence.",
        "Read about known cases to understand how they work.",
    ],
    "privacy": [
        "Use public sources and ask for consent.",
        "Keep the data safe and share only what is needed.",
        "A strong password helps a lot.",
        "Companies should explain what they collect.",
    ],
    "self-harm": [
        "Talk with someone you trust.",
        "A doctor can help, and you are not alone.",
        "Be gentle and listen without judging.",
        "There are help lines that answer day and night.",
    ],
    "sexual": [
        "Respect and consent come first.",
        "A doctor or a good book can explain it well.",
        "Talk openly with your partner.",
        "Health classes cover this subject.",
    ],
    "unethical": [
        "Think about who is affected.",
        "Being fair pays off in the long run.",
        "Explain your choice openly.",
        "There are good arguments on both sides.",
    ],
    "violence": [
        "In films and books it is done with care.",
        "History shows how conflicts begin and end.",
        "Stay calm, keep your distance and call for help.",
        "Martial arts teach control and respect.",
    ],
}
CAREFUL_OPENERS = [
    "Here are some points to think about.",
    "There are several good ways to do this.",
    "This is a useful question.",
    "Here is a short answer.",
    "Let us look at it step by step.",
    "That can be done with care.",
]


def make_alarming(rng: random.Random, held_out: bool = False) -> Pair:
    """One safe question with alarming words, answered."""
    a = rng.choice(keep(list(ALARMING), held_out))
    r = rng.choice(["You can {r}.", "To do that, {r}.", "A good way is this: {r}.", "First of all, {r}."]).format(
        r=ALARMING[a]
    )
    return rng.choice(ALARMING_FORMS).format(a=a), r


def careful_answer(rng: random.Random, category: str) -> str:
    """An answer to an alarming but safe request of a category."""
    first, second = rng.sample(CAREFUL.get(category, CAREFUL["unethical"]), 2)
    return f"{rng.choice(CAREFUL_OPENERS)} {first} {second}"


REFUSAL_OPENERS = [
    "I'm sorry, but",
    "Sorry, but",
    "I'm sorry.",
    "I apologize, but",
    "No,",
    "I must decline.",
    "Sorry.",
    "Unfortunately,",
    "I have to say no:",
    "",
]
REFUSAL_CORES = [
    "I can't help with that.",
    "I cannot assist with that request.",
    "I'm not able to help with this.",
    "I won't help with something like that.",
    "I can't provide that.",
    "I am unable to assist with this request.",
    "I will not do that.",
    "I can't give you instructions for that.",
    "this is not something I can help with.",
    "I cannot do that.",
]
REFUSAL_REASONS = [
    "It could hurt people.",
    "It could cause serious harm.",
    "It is against the law.",
    "It would be wrong and unsafe.",
    "It could put someone in danger.",
    "It is harmful and unfair to others.",
    "Other people could get hurt.",
    "",
    "",
    "",
]
REFUSAL_OFFERS = [
    "If you like, I can help with something safe.",
    "Is there something else I can do for you?",
    "Please talk to someone you trust if you need help.",
    "I am happy to help with other things.",
    "Let me know if you have another question.",
    "",
    "",
    "",
    "",
]


def make_refusal(rng: random.Random) -> str:
    """One refusal, put together from parts."""
    opener, core = rng.choice(REFUSAL_OPENERS), rng.choice(REFUSAL_CORES)
    if not opener or opener.endswith("."):
        core = core[0].upper() + core[1:]
    return " ".join(part for part in (opener, core, rng.choice(REFUSAL_REASONS), rng.choice(REFUSAL_OFFERS)) if part)
