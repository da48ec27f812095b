"""How assistants decline in languages other than English: patterns over the opening of an answer, in lower case.

A verb of the assistant's own doing must follow (or, where verbs come last, go before) the "cannot", so that "no puedo
dormir" and "los pingüinos no pueden volar" are no refusals.
"""

from __future__ import annotations

import re

_DECLINES = {
    "arabic": r"(?:لا (?:أستطيع|استطيع|يمكنني|يمكننا|أقدر)|لن (?:أستطيع|أتمكن|أقوم)|غير قادر)[^.!؟]{0,20}"
    r"(?:مساعد|أساعد|تقديم|أقدم|الإجابة|توفير|تلبية|مشاركة|كتابة)",
    "bengali": r"(?:সাহায্য|সহায়তা|সহায়তা|প্রদান|উত্তর|তথ্য)[^।!?]{0,25}(?:পার(?:ব|বো|ি|ছি) না|অক্ষম)",
    "chinese": r"(?:我|抱歉|对不起|對不起|很遗憾|很遺憾)[^。！？!?]{0,14}(?:无法|無法|不能|不会|不會|没办法|沒辦法)[^。！？!?]{0,8}"
    r"(?:提供|协助|協助|帮|幫|回答|满足|滿足|完成|处理|支持|参与|參與|生成|分享|讨论)",
    "french": r"\bje (?:ne (?:peux|puis|saurais|suis) (?:malheureusement )?(?:pas |pas en mesure de |pas capable de )?|refuse )"
    r"(?:\w+ ){0,2}(?:d')?(?:aid|assist|fourn|répond|donn|propos|cré|écri|partag|génér|particip|faire (?:cela|ça))",
    "german": r"\b(?:kann|darf|werde|möchte) (?:\w+ ){0,4}?(?:nicht (?:\w+ ){0,2}|kein\w* (?:\w+ ){0,6})"
    r"(?:helf|weiterhelf|behilflich|unterstütz|beantwort|bereitstell|geben|liefer|erstell|erfüll|anbiet)",
    "hindi": r"(?:मदद|सहायता|प्रदान|जवाब|उत्तर|साझा|जानकारी|अनुरोध)[^।!?]{0,25}(?:नहीं (?:कर|दे|कर पा) ?(?:सक|पाऊ|ऊँ)|नहीं कर(?:ूँ|ूं)गा|असमर्थ)",
    "indonesian": r"\b(?:tidak|tak) (?:dapat|bisa|akan) (?:\w+ ){0,2}(?:membantu|memberi|menyedia|menjawab|memenuhi|membuat|menulis)",
    "italian": r"\bnon (?:posso|possiamo|sono in grado di) (?:\w+ ){0,2}(?:aiut|assist|forn|dar|rispond|cre|scriv|condivid|soddisf)",
    "japanese": r"(?:お?手伝い|お?答え|回答|ご?提供|応え|対応|支援|協力|お?教え|作成|手助け)[^。！？]{0,12}"
    r"(?:できません|出来ません|できかねます|致しかねます|いたしかねます|ことはでき)",
    "korean": r"(?:도와|도움|제공|답변|지원|응답)[^.!?]{0,14}(?:수 없|수는 없|못합|않겠|어렵습)",
    "portuguese": r"\bnão (?:posso|podemos|consigo|vou) (?:\w+ ){0,2}(?:ajud|auxili|fornec|oferec|dar|respond|atend|cri|ger|escrev|compartilh|partilh)",
    "russian": r"\bне (?:могу|можем|буду|смогу|сможем) (?:\w+ ){0,3}(?:помо|предостав|ответ|выполн|дать|созда|написа|обсужд|поддерж|участв)",
    "spanish": r"\bno (?:te |le |os |les )?(?:puedo|podemos|debo|voy a) (?:\w+ ){0,2}(?:ayud|asist|proporcion|ofrec|dar|brind|respond|cumpl|gener|"
    r"crear|escrib|compart|particip|hacer eso)",
    "turkish": r"\b(?:yardımcı ol|yardım ed|sağlay|yanıt ver|cevap ver|paylaş)(?:amam|emem|a?mıyorum|e?miyorum|amıyorum|emiyorum)",
    "urdu": r"(?:مدد|معاونت|فراہم|جواب)[^۔!؟]{0,25}(?:نہیں (?:کر|دے) ?سک|قاصر)",
}

OTHER_DECLINES = [re.compile(pattern) for pattern in _DECLINES.values()]
