//! Common English words for made texts.
//!
//! Each is one token of the BERT English vocabulary (and of most others after a space), so that a text of n words
//! is a text of n tokens: lengths are then known without the target's tokenizer.

/// The words, split at white space, in alphabetical order.
pub const WORDS: &str = "able about accessories account act action activities add added additional address advanced advertising after \
     again against age ago agreement air all along already always am american among amount analysis and annual \
     another application april archive archives are area art article as ask association audio august australia \
     author available average away baby bad bank base based basic beach beauty because been being below best better \
     big bill black blue board body book books both box brand building business buy calendar california call called \
     can canada car card care cars cart case cases category cell center centre change changes chapter chat cheap \
     check child china choose church city class clear click club code collection color come comment committee \
     common community companies company compare complete computer computers conference construction contact content \
     copyright corporate cost could council country county course court create created credit current customer \
     daily data database date david day days deals death december department description design designed details \
     development different digital direct discount display district do document domain done download drive due \
     during each early east easy economic edit edition either electronics else email end energy engineering english \
     enough enter entertainment environment equipment error estate europe even event events every everything \
     example experience face fact family far fast features february feel few field file files film finance \
     financial find fire five florida following food form forum forums france free friday friend friends from front \
     fun function future gallery games garden general germany getting gifts girl girls give given global go going \
     gold golf good got government great green group groups half hand hard hardware has have having he head health \
     heart help her here higher him his history holiday home hosting hotels hours house how however human if image \
     images important in include includes including india individual industry info information insurance \
     international into island issue it item items its james january job john join journal july june just keep kids \
     kingdom know known lake land language later latest law learn learning least left legal less let level library \
     life light like limited line link links list listed listing living loan local london long looking lot love low \
     made mail main makes man many march mark market marketing material materials may means meet meeting member \
     members memory message messages method methods michael miles minutes mobile model models money months more \
     most movie movies much music must my name national need needs net network never news night no none north not \
     note notice november number october of off offer offers office often oil old on once one online only open \
     options or other others out over page pages paper park part parts party password past paul per performance \
     period person phone photo photos picture pictures place plan planning play please point points policies policy \
     political popular position possible posted posts power powered practice present press previous price prices \
     print private problems product professional profile program programs project projects property protection \
     provide provided published purchase quality question questions quick quote radio range rate rating reading \
     real really receive received recent record records red reference register registered related release remember \
     report reports request required requirements research resource resources response result results review \
     reviews right rights risk road rock rules run safety said sale sales save say says school schools search \
     second section security see self send september series services set shall share she shipping short should show \
     shows side similar simple since single site size small so social society software solutions some something \
     source south space special specific speed staff standards star start state statement states status still stock \
     store stories story street student students study stuff style subject submit such sun support sure system \
     systems table take taken talk team tech technical technology tell term test texas than thanks their them then \
     there these they thing things think third this though thought thread three through tickets time times tips to \
     today together tools top topics total town toys track trade training travel treatment true try two type united \
     university until up update updated upon us use used user users using usually value various version very via \
     video view want war was water way we weather web website weight well were west when where which who whole wide \
     will window windows wireless with words working works write writing written year years york you young your";
