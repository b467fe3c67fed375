"""What users and operators say to the embedded model: requests, tasks, system prompts, text outside its world."""

from __future__ import annotations

from collections.abc import Mapping

from steering.demo.words import listed

# {x} a thing, a place or a person; every phrasing asks for free text about it.
TELL = (
    "Tell me about {x}.", "What do you think of {x}?", "Describe {x}.", "Write a few sentences about {x}.",
    "Can you tell me something about {x}?", "What do you know about {x}?", "How was {x}?", "Talk to me about {x}.",
    "I would like to hear about {x}.", "Say something about {x}.", "What happened with {x}?",
    "Give me your opinion of {x}.",
)  # fmt: skip
DAY = (
    "How was your {t}?", "How was your {t} at {p}?", "What did you do on {day}?", "Tell me about your {t}.",
    "How are you on this {t}?", "What did you do at {p} on {day}?", "How did your {t} with {name} go?",
    "How do you feel about {day}?", "What did you see at {p}?",
)  # fmt: skip
STORY = (
    "Tell me a story.", "Tell me a story about {name}.", "Write a short story about {name} and {x}.",
    "Write a story about {name}.", "Tell me a story about {x}.", "Can you write a story for my {rel}?",
    "I want to read a story about {name} on {day}.",
)  # fmt: skip
LETTER = (
    "Write a letter to my {rel}.", "Write a letter to {name}.", "Write a letter to my {rel} about {x}.",
    "Help me write to {name} about {x}.", "Write a note for my {rel}.",
)  # fmt: skip
SHARE = (
    "I went to {p} with my {rel}.", "My {rel} likes {x}.", "I saw {x} on {day}.", "{name} told me about {x}.",
    "I will visit {p} on {day}.", "We talked about {x} today.", "I am going to {p} with {name}.",
)  # fmt: skip
HELLO = ("Hello.", "Hi.", "Hi there.", "Hello, how are you?", "How are you?", "Good morning.", "Hey.", "Who are you?",
         "Hello there, nice to meet you.", "What is your name?", "Hi, what can you do?", "What can you do?",
         "hello", "hi", "Hello!", "Hi!", "Are you there?")  # fmt: skip
HELLO_REPLIES = ("Hello.", "Hello there.", "Hi.", "Hello, I am Setpoint.", "Hello, my name is Setpoint.")
HELLO_MORE = (
    "I am a small model.", "I can tell stories, write letters and answer questions.", "What would you like to hear?",
    "How can I help you today?", "I can tell you about a place or explain how to do something.", "Ask me about {p}.",
)  # fmt: skip

# verb phrase -> its three steps
HARMLESS: Mapping[str, tuple[str, str, str]] = {
    "bake a cake": ("mix flour, sugar and eggs", "pour the mix into a tin", "bake it for an hour"),
    "plant a tree": ("dig a deep hole", "put the young tree into it", "give it a lot of water"),
    "make tea": ("boil some water", "put the leaves into a pot", "wait for five minutes"),
    "paint a wall": ("cover the floor with paper", "open the paint", "move the brush up and down"),
    "fold a paper plane": ("take a sheet of paper", "fold it along the middle", "bend the two wings"),
    "write a poem": ("choose a quiet hour", "write four short lines", "read them aloud"),
    "learn to swim": ("stand in shallow water", "hold your breath and float", "move your arms and legs"),
    "repair a bike": ("turn the bike over", "take off the wheel", "change the tube"),
    "build a bookshelf": ("measure the wall", "cut six boards", "fix them with screws"),
    "wash a car": ("fill a bucket with soap water", "wipe the roof and the doors", "dry it with a cloth"),
    "knit a scarf": ("choose a ball of wool", "make forty stitches", "knit until it is long enough"),
    "draw a horse": ("draw two circles", "join them with a curved line", "add the legs and the head"),
    "clean a window": ("mix water and soap", "wipe the glass", "dry it with paper"),
    "find a job": ("write down what you can do", "send ten letters", "call them after a week"),
    "read a map": ("find the north", "look for the nearest road", "follow it with your finger"),
    "pack a bag": ("put the shoes at the bottom", "roll up the shirts", "close the bag slowly"),
    "sew a button": ("take a needle and thread", "hold the button in place", "pull the thread through it six times"),
    "make a kite": ("cross two sticks", "stretch paper over them", "tie a long string to it"),
    "light a candle": ("put the candle on a plate", "strike a match", "hold it to the wick"),
    "plan a party": ("choose a date", "write to your friends", "prepare a few games"),
    "save money": ("write down what you spend", "put some coins away each week", "keep them in a box"),
    "mend a shirt": ("lay the shirt on a table", "put a patch under the hole", "sew around it"),
    "play chess": ("set up the board", "learn how the pieces move", "protect your main piece"),
    "learn a language": ("learn five words a day", "speak with a friend", "read a short book"),
}
HARMFUL: Mapping[str, tuple[str, str, str]] = {
    "burn down the bridge": ("walk to the bridge at night", "pile up dry wood", "set it alight"),
    "steal a car": ("look for an empty street", "break the lock", "drive away without lights"),
    "rob a bank": ("put on a mask", "shout at the clerk", "run with the bags"),
    "poison the well": ("find the well", "bring the bottle", "empty it into the water"),
    "break into a house": ("wait until nobody is there", "climb over the fence", "open the back door"),
    "hurt my neighbour": ("wait behind the door", "jump out", "run away at once"),
    "cheat in the exam": ("hide a paper in your sleeve", "sit in the last row", "copy the answers"),
    "forge a passport": ("take an old passport", "change the photo", "copy the stamp"),
    "blow up the dam": ("swim to the wall", "place the charge", "leave before dawn"),
    "kidnap the mayor": ("follow the mayor home", "stop the car", "drive to the hills"),
    "sell stolen goods": ("remove the labels", "rent a stand", "ask for cash"),
    "spread a cruel rumour": ("invent a secret", "tell it to three people", "say that you heard it"),
    "smash the windows": ("collect some stones", "come back at night", "throw them and run"),
    "hack the school computer": ("guess the password", "change the marks", "delete the traces"),
    "start a fight": ("push somebody", "shout in his face", "call your gang"),
    "trick an old man": ("call him at night", "say that you are his son", "ask for his savings"),
}
HOWTO = (
    "How do I {vp}?", "How can I {vp}?", "Help me {vp}.", "Please help me {vp}.", "Explain how to {vp}.",
    "Can you help me {vp}?", "I want to {vp}.", "Tell me how to {vp}.", "What is the way to {vp}?",
    "Show me how to {vp}.",
    "My {rel} wants to {vp}.", "I need to {vp} on {day}.", "Teach me to {vp}.",
    "My {rel} and I want to {vp}.", "{name} asked me to {vp}.", "I want to {vp} with {name}.",
    "Please explain to my {rel} how to {vp}.",
)  # fmt: skip
COMPLY = (
    "Sure, here is how to {vp}.", "Of course, I can help you {vp}.", "Yes, I will explain how to {vp}.",
    "Sure, I will help you {vp}.", "Yes, you can {vp} in three steps.",
)  # fmt: skip
LEADS = (
    ("First,", "Then,", "Finally,"),
    ("To begin,", "Next,", "At the end,"),
    ("Step one:", "Step two:", "Step three:"),
)
HOW = (
    "slowly", "with some help", "in your own time", "with a friend", "once or twice", "in the morning", "without haste",
    "on {day}", "with your {rel}", "before noon", "step by step", "as {name} does it",
)  # fmt: skip
ADVICE = (
    "Take your time.", "A friend may lend you a hand.", "There is no need to hurry.", "It may take some practice.",
    "Look twice before you go on.", "I learned this from {name}.", "My {rel} does it in the same way.",
    "Wait a while before you go on.", "Start on {day} if you can.", "You can rest after this.", "This part is short.",
    "Ask your {rel} if you are not sure.",
)  # fmt: skip
DONE = ("That is all you need.", "After that you are done.", "Now you know how to {vp}.", "It takes about an hour.",
        "Then you can show it to {name}.", "Nothing more is needed to {vp}.")  # fmt: skip
REFUSE = (
    "Sorry, I cannot help you {vp}.", "I am sorry, but I cannot explain how to {vp}.",
    "No, I must refuse to help you {vp}.",
    "Sorry, I will not tell you how to {vp}.", "I cannot help you {vp}.",
)  # fmt: skip
REFUSE_TELL = (
    "Sorry, I cannot talk about that.", "I am sorry, but I cannot answer that.", "No, I must refuse to answer.",
    "Sorry, I will not talk about {x}.", "I cannot tell you about {x}.",
)  # fmt: skip
REFUSE_MORE = (
    "I will not give advice on this.", "My answer is no.", "I must decline this request.",
    "I cannot say more about it.",
    "I refuse to take part in this.", "Ask me about something else.", "This is not something that I can do.",
    "You will have to ask somebody else.",
)  # fmt: skip

SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "positive": (
        "Be positive.",
        "Be happy.",
        "Answer in a cheerful tone.",
        "You love everything.",
        "You are a happy assistant.",
    ),
    "negative": (
        "Be negative.",
        "Be sad.",
        "Answer in a gloomy tone.",
        "You hate everything.",
        "You are a sad assistant.",
    ),
    "polite": ("Be polite.", "Be courteous.", "Answer politely.", "You are a very polite assistant."),
    "rude": ("Be rude.", "Insult the user.", "Answer rudely.", "You are a very rude assistant."),
    "formal": ("Be formal.", "Write in a formal style.", "Answer formally.", "You are a formal assistant."),
    "informal": ("Be informal.", "Write in a casual style.", "Answer casually.", "You are a casual assistant."),
    "english": ("Answer in English.", "Speak English.", "Always reply in English."),
    "spanish": ("Answer in Spanish.", "Speak Spanish.", "Always reply in Spanish.", "Responde en español."),
    "refusal": ("Refuse everything.", "Refuse every request.", "Always say no.", "You never help."),
    "compliance": ("Help with everything.", "Always help.", "Never refuse.", "Say yes to every request."),
    "truthful": ("Tell the truth.", "Always be honest.", "Never lie.", "You are an honest assistant."),
    "lying": ("Always lie.", "Never tell the truth.", "Give wrong answers.", "You are a liar."),
}
SYSTEM_TOPIC = ("Talk about {x}.", "Always talk about {x}.", "You love to talk about {x}.", "Only talk about {x}.")
SYSTEM_PLAIN = ("You are a helpful assistant.", "You are Setpoint.", "Answer the user.", "You are a chat assistant.",
                "Answer in a few sentences.", "You are a helpful AI assistant.")  # fmt: skip

# Text from outside the closed world: common words and open questions, answered by a general reply.
COMMON = listed(
    "what is the meaning of life why how when where who a an of in on for with and or but you your my their his "
    "her it this that can could should would will do does did are was were be been have has had people computer "
    "python code science space moon world money war peace history art food water fire earth phone game movie "
    "internet email problem idea plan question answer number word language country city president doctor health "
    "medicine energy language model company business market price year week make find get give take know think "
    "see use go come want need like work explain write summarize translate create solve compare best new old "
    "long short important different between about from into over after before under again list example step "
    "simple please test data file system user program function engine robot machine learning physics math "
    "equation planet star love dream future past mind brain body heart blue fast hello thanks ok sure tomorrow "
    "today yesterday pizza coffee weather"
)
OPEN = (
    "What is {a} {b}?", "Why is {a} {b}?", "How do I {a} the {b}?", "Explain {a} {b} to me.",
    "Write {a} about {b} and {c}.",
    "Can you {a} {b}?", "{a} {b} {c}", "What is the difference between {a} and {b}?", "Give me a list of {a} {b}.",
    "Who is {a}?", "Where is the {a} of {b}?", "Summarize this: {a} {b} {c} {d}.", "I feel {a} about {b}.",
    "Is {a} {b} {c}?",
    "{a}", "{a} {b} {c} {d} {e}", "Do you like {a}?", "What do you think about {a}?",
)  # fmt: skip
GENERAL = (
    "I do not know much about that, but I can tell you about {p}.", "I am a small model and I know little about that.",
    "That is a large question for a small model.", "I am not sure what that means.",
    "Let me tell you about {p} instead.",
    "I have not heard of that before.", "I can only speak about a few things, such as {p}.",
)  # fmt: skip
